"""Damaged checkpoints are noticed, put aside and passed over."""

import functools
import shutil

import jax
import numpy as np
import pytest

from sora_jax.parallel.mesh import MeshConfig, make_mesh
from sora_jax.training import checkpoint
from sora_jax.training.checkpoint import Checkpointer, CheckpointError, flatten, restore_params
from sora_jax.training.digest import digest
from sora_jax.training.optimizer import OptimizerConfig
from sora_jax.training.state import init_state, make_setup
from tests import toy


@functools.cache
def setup_of(mesh=None, **kwargs):
  mesh = make_mesh(mesh or MeshConfig(fsdp=2, replica=2, tensor=2))
  return make_setup(toy.task(**kwargs), optimizer=OptimizerConfig(), num_steps=10, mesh=mesh, seed=0)


@pytest.fixture(scope="module")
def sound(tmp_path_factory):
  """A workdir with steps 1, 2 and 3; the parameters of step i are all i."""
  workdir, setup = tmp_path_factory.mktemp("sound"), setup_of()
  state = init_state(setup)
  checkpointer = Checkpointer(workdir, keep=5)
  for step in (1, 2, 3):
    state["params"] = jax.tree.map(lambda x, i=step: x * 0 + i, state["params"])
    checkpointer.save(step, state, {"model": {"width": 16}})
  checkpointer.close()
  return workdir


@pytest.fixture
def saved(sound, tmp_path):
  """A copy to damage."""
  workdir = tmp_path / "run"
  shutil.copytree(sound, workdir)
  return workdir, setup_of()


def data_files(folder):
  """The files that hold arrays; orbax leaves some unused ones among them."""
  return [path for path in folder.rglob("*") if path.is_file() and path.parent.name == "d"]


def restore(workdir, setup, **kwargs):
  checkpointer = Checkpointer(workdir)
  try:
    return checkpointer.restore(setup.abstract, **kwargs)
  finally:
    checkpointer.close()


def test_restores_the_newest(saved):
  workdir, setup = saved
  step, state, meta = restore(workdir, setup)
  assert step == 3 and (np.asarray(state["params"]["up"]) == 3).all()
  assert meta["config"] == {"model": {"width": 16}} and meta["devices"] == 8
  assert state["params"]["blocks"].sharding == setup.shardings["params"]["blocks"]
  assert restore(workdir, setup, step=2)[0] == 2
  with pytest.raises(FileNotFoundError, match=r"no checkpoint of step 7 .* there are \[1, 2, 3\]"):
    restore(workdir, setup, step=7)


def flip_bits(workdir, step, item):
  """One bit in the middle of each data file of an item."""
  for path in data_files(workdir / checkpoint.FOLDER / str(step) / item):
    data = bytearray(path.read_bytes())
    data[len(data) // 2] ^= 1
    path.write_bytes(data)


@pytest.mark.parametrize("item", ["params", "opt"])
def test_a_flipped_bit_is_noticed(saved, item):
  workdir, setup = saved
  flip_bits(workdir, 3, item)
  step, state, _ = restore(workdir, setup)
  assert step == 2 and (np.asarray(state["params"]["up"]) == 2).all()
  (bad,) = (workdir / checkpoint.BAD_FOLDER).iterdir()
  assert bad.name.startswith("3-") and (bad / "REASON.txt").read_text()
  assert restore(workdir, setup)[0] == 2


def test_a_wrong_array_is_noticed_by_the_digest_alone(saved):
  """Step 3 gets the parameter files of step 2, whole and readable."""
  workdir, setup = saved
  folder = workdir / checkpoint.FOLDER
  (folder / "3" / "params").rename(workdir / "old")
  (folder / "2" / "params").rename(folder / "3" / "params")
  (workdir / "old").rename(folder / "2" / "params")
  assert restore(workdir, setup)[0] == 1
  reasons = [(path / "REASON.txt").read_text() for path in (workdir / checkpoint.BAD_FOLDER).iterdir()]
  assert len(reasons) == 2 and all("params read do not match their digest" in reason for reason in reasons)


@pytest.mark.parametrize("damage", ["truncate", "no_item", "no_meta", "empty"])
def test_a_broken_checkpoint_is_passed_over(saved, damage):
  workdir, setup = saved
  folder = workdir / checkpoint.FOLDER / "3"
  if damage == "truncate":
    for path in data_files(folder / "params"):
      path.write_bytes(path.read_bytes()[: path.stat().st_size // 2])
  else:
    name = {"no_item": "ema", "no_meta": "meta", "empty": "."}[damage]
    for path in sorted((folder / name).rglob("*"), reverse=True):
      path.rmdir() if path.is_dir() else path.unlink()
  assert restore(workdir, setup)[0] == 2


def test_nothing_sound_is_an_error_and_nothing_at_all_is_none(saved, tmp_path_factory):
  workdir, setup = saved
  for step in (1, 2, 3):
    flip_bits(workdir, step, "ema")
  with pytest.raises(CheckpointError, match=r"none of the checkpoints \[3, 2, 1\]"):
    restore(workdir, setup)
  with pytest.raises(CheckpointError, match="were damaged and moved"):  # nor does the next start begin anew
    restore(workdir, setup)
  assert restore(tmp_path_factory.mktemp("empty"), setup) is None


def test_a_damaged_step_asked_for_by_number_names_the_others(saved):
  workdir, setup = saved
  flip_bits(workdir, 3, "ema")
  with pytest.raises(CheckpointError, match=r"checkpoint 3 .* is damaged; the others are \[1, 2\]"):
    restore(workdir, setup, step=3)


def test_a_checkpoint_of_another_model_is_not_damage(saved):
  workdir, setup = saved
  with pytest.raises(ValueError, match=r"does not fit this model.*was float32\[.*now float32\[") as error:
    restore(workdir, setup_of(width=32))
  assert not isinstance(error.value, CheckpointError)
  assert restore(workdir, setup)[0] == 3 and not (workdir / checkpoint.BAD_FOLDER).exists()


def test_restores_on_other_devices_and_the_ema_alone(saved):
  workdir, _ = saved
  setup = setup_of(make_mesh(MeshConfig(), jax.devices()[:1]))
  step, ema, rest, _ = restore_params(workdir, setup)
  assert step == 3 and ema["up"].sharding.num_devices == 1 and (rest["frozen"] == 1).all()
  assert restore_params(workdir, setup, which="params", step=1)[1]["up"][0, 0] == 1
  with pytest.raises(FileNotFoundError, match="train first"):
    restore_params(workdir / "none", setup)


def test_keeps_the_newest(tmp_path):
  state, checkpointer = init_state(setup_of()), Checkpointer(tmp_path, keep=2)
  for step in range(4):
    checkpointer.save(step, state, {})
  checkpointer.close()
  assert sorted(int(path.name) for path in (tmp_path / checkpoint.FOLDER).iterdir()) == [2, 3]


def test_digest_sees_every_bit_and_no_layout():
  setup = setup_of()
  state = init_state(setup)["params"]
  host = jax.device_get(state)
  assert digest(state) == digest(host)
  for bit in range(32):
    changed = jax.tree.map(np.copy, host)
    changed["up"].view(np.uint32)[3, 5] ^= np.uint32(1 << bit)
    assert digest(changed) != digest(host)
  swapped = host | {"up": host["up"][::-1].copy()}
  assert digest(swapped) != digest(host)
  for dtype in (np.int32, np.bool_, np.float16):
    assert digest({"x": np.ones(3, dtype)}) != digest({"x": np.array([1, 1, 0], dtype)})


def test_flatten():
  assert flatten({"a": {"b": 1, "c": {"d": [2]}}, "e": None}) == {"a.b": 1, "a.c.d": [2], "e": None}
