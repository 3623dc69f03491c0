"""Config -> Task: the one place that knows every task by name."""

from collections.abc import Mapping

import ml_collections

from sora_jax.conditioning.text import TextConfig
from sora_jax.diffusion.objectives import ObjectiveConfig
from sora_jax.models.dit import DiTConfig
from sora_jax.tasks import text_to_video
from sora_jax.types import BatchSpec, Task


def section(cls, config: ml_collections.ConfigDict, name: str):
  """`config[name]` as the dataclass `cls`; a key that it does not have is the user's mistake."""
  values = dict(config[name])
  unknown = sorted(set(values) - set(cls.__dataclass_fields__))
  if unknown:
    known = ", ".join(sorted(cls.__dataclass_fields__))
    raise ValueError(f"config.{name} has no key {', '.join(unknown)}; it has {known}")
  return cls(**values)


def text_config(config: ml_collections.ConfigDict, vocab_size: int) -> TextConfig:
  """The text section with the size that the trained vocabulary turned out to have."""
  with config.unlocked():
    config.text.vocab_size = vocab_size
  return section(TextConfig, config, "text")


def build(
  config: ml_collections.ConfigDict,
  *,
  batch_spec: BatchSpec,
  vocab_size: int,
  parts: Mapping[str, int] | None = None,
) -> Task:
  """The task that `config.task` names; the rest comes from the data: `parts` are its sources, where it has
  several, by name, with the first sample_id beyond each."""
  if config.task != "text_to_video":
    raise ValueError(f"config.task={config.task!r} is unknown; tasks: text_to_video")
  return text_to_video.build(
    model=section(DiTConfig, config, "model"),
    text_config=text_config(config, vocab_size),
    diffusion=section(ObjectiveConfig, config, "diffusion"),
    batch_spec=batch_spec,
    parts=parts,
  )
