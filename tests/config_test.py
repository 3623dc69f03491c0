"""Every config and preset fills its dataclasses, and every key can be set from the command line."""

import dataclasses
import importlib.util
from pathlib import Path

import pytest

from configs import common
from data_pipelines.config import DataConfig
from sora_jax.conditioning.text import TextConfig
from sora_jax.diffusion.objectives import ObjectiveConfig
from sora_jax.generate import SampleConfig
from sora_jax.models.dit import DiTConfig
from sora_jax.parallel.mesh import MeshConfig
from sora_jax.rehearsal.run import RehearseConfig
from sora_jax.tasks.registry import section
from sora_jax.training.loop import TrainConfig
from sora_jax.training.optimizer import OptimizerConfig

SECTIONS = {
  "model": DiTConfig,
  "text": TextConfig,
  "diffusion": ObjectiveConfig,
  "data": DataConfig,
  "optimizer": OptimizerConfig,
  "mesh": MeshConfig,
  "train": TrainConfig,
  "sample": SampleConfig,
  "rehearse": RehearseConfig,
}
SET_ELSEWHERE = {"train": {"seed"}}  # config.seed
FOLDER = Path(__file__).parent.parent / "configs"
PRESETS = {
  "quickstart.py": ("", "own_data", "debug"),
  "scaling.py": ("", "debug"),
  "t2v_700m.py": ("", "v6e", "debug"),
  "t2v_5b.py": ("", "debug"),
  "t2v_30b.py": ("", "two_slices", "debug"),
}


def test_common_names_every_key():
  """A key that is not in the config could not be given as --config.section.key."""
  config = common.get_config()
  for name, cls in SECTIONS.items():
    fields = {f.name for f in dataclasses.fields(cls)} - SET_ELSEWHERE.get(name, set())
    assert set(config[name]) == fields, name


def test_every_config_file_is_listed():
  assert {p.name for p in FOLDER.glob("*.py")} - {"__init__.py", "common.py"} == set(PRESETS)


@pytest.mark.parametrize("file,preset", [(f, p) for f, presets in PRESETS.items() for p in presets])
def test_presets_fill_their_sections(file, preset):
  spec = importlib.util.spec_from_file_location("config_under_test", FOLDER / file)
  module = importlib.util.module_from_spec(spec)
  spec.loader.exec_module(module)
  config = module.get_config(preset)
  for name, cls in SECTIONS.items():
    assert isinstance(section(cls, config, name), cls)


def test_a_wrong_key_fails_by_name():
  config = common.get_config()
  config.model.wdith = 3
  with pytest.raises(ValueError, match="config.model has no key wdith"):
    section(DiTConfig, config, "model")
