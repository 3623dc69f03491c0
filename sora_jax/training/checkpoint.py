"""Checkpoints that a digest vouches for."""

import json
import time
from pathlib import Path

import flax
import jax
import orbax.checkpoint as ocp
from absl import logging

from sora_jax.parallel import multihost
from sora_jax.training.digest import digest, shapes
from sora_jax.training.state import Setup
from sora_jax.types import PyTree

FOLDER = "checkpoints"
BAD_FOLDER = "checkpoints_bad"
META = "meta"


class CheckpointError(ValueError):
  """No sound checkpoint where there should be one."""


class MismatchError(ValueError):
  """A sound checkpoint of something else."""


class Checkpointer:
  """Saves the parts of a state as items of one orbax step, and restores the newest step that is sound."""

  def __init__(self, workdir: str | Path, *, keep: int = 3, read_only: bool = False):
    self.folder = Path(workdir).absolute() / FOLDER
    self.bad_folder = Path(workdir).absolute() / BAD_FOLDER
    if read_only and not self.folder.is_dir():
      raise FileNotFoundError(f"no checkpoints in {workdir}: {self.folder} does not exist; train first")
    self.keep, self.read_only = keep, read_only
    self.manager = self._open()

  def _open(self) -> ocp.CheckpointManager:
    options = ocp.CheckpointManagerOptions(
      max_to_keep=None if self.read_only else self.keep,
      create=not self.read_only,
      read_only=self.read_only,
      cleanup_tmp_directories=not self.read_only,
      enable_async_checkpointing=True,
    )
    return ocp.CheckpointManager(self.folder, options=options)

  def steps(self) -> list[int]:
    return sorted(self.manager.all_steps())

  def save(self, step: int, state: PyTree, config: dict) -> None:
    """Returns once the arrays are copied to the host; writing goes on behind."""
    if step in self.steps():
      return
    items = {name: part for name, part in state.items() if jax.tree.leaves(part)}
    meta = {
      "step": step,
      "digest": {name: digest(part) for name, part in items.items()},
      "shapes": {name: shapes(part) for name, part in items.items()},
      "versions": {"jax": jax.__version__, "flax": flax.__version__, "orbax": ocp.__version__},
      "devices": jax.device_count(),
      "time": time.strftime("%Y-%m-%dT%H:%M:%S%z"),
      "config": config,
    }
    saved = {name: ocp.args.StandardSave(part) for name, part in items.items()}
    self.manager.save(step, args=ocp.args.Composite(**saved, **{META: ocp.args.JsonSave(meta)}), force=True)

  def restore(self, abstract: PyTree, *, step: int | None = None) -> tuple[int, PyTree, dict] | None:
    """(step, state, meta) of the newest sound checkpoint; None where there is none at all.

    `abstract` may hold some of the parts only (say params and rest). A checkpoint that cannot be read
    or whose digest differs is moved aside. `step` asks for one step and no other.
    """
    wanted = self.steps()[::-1] if step is None else [step]
    if step is not None and step not in self.steps():
      raise FileNotFoundError(f"no checkpoint of step {step} in {self.folder}; there are {self.steps()}")
    for candidate in wanted:
      try:
        return candidate, *self._read(candidate, abstract)
      except MismatchError as error:
        raise ValueError(str(error)) from None
      except Exception as error:  # orbax raises many types for a damaged file
        reason = f"{type(error).__name__}: {str(error).splitlines()[0][:200] if str(error) else ''}"
        if step is not None or self.read_only:
          logging.warning("checkpoint %d in %s is damaged (%s)", candidate, self.folder, reason)
        else:
          self._put_aside(candidate, reason)
    if step is not None:
      others = [s for s in self.steps() if s != step]
      raise CheckpointError(f"checkpoint {step} in {self.folder} is damaged; the others are {others}")
    if wanted and self.read_only:
      raise CheckpointError(f"none of the checkpoints {wanted} in {self.folder} is sound")
    if wanted:
      raise CheckpointError(
        f"none of the checkpoints {wanted} in {self.folder} is sound; use another workdir (those are "
        f"kept in {self.bad_folder})"
      )
    if not self.read_only and self.bad_folder.is_dir() and any(self.bad_folder.iterdir()):
      # Starting over in silence would pass for a resume.
      raise CheckpointError(
        f"{self.folder} is empty, for its checkpoints were damaged and moved to {self.bad_folder}; use "
        "another workdir, or remove that folder to start from scratch here"
      )
    return None

  def _read(self, step: int, abstract: PyTree) -> tuple[PyTree, dict]:
    meta = self.manager.restore(step, args=ocp.args.Composite(**{META: ocp.args.JsonRestore()}))[META]
    parts = {name: part for name, part in abstract.items() if jax.tree.leaves(part)}
    for name, part in parts.items():
      if (new := shapes(part)) != (old := meta["shapes"][name]):
        keys = sorted(key for key in {*old, *new} if old.get(key) != new.get(key))
        raise MismatchError(
          f"checkpoint {self.folder}/{step} does not fit this model or optimizer: {name}/{keys[0]} was "
          f"{old.get(keys[0])}, now {new.get(keys[0])} ({len(keys)} differ); use another workdir"
        )
    args = ocp.args.Composite(**{name: ocp.args.StandardRestore(part) for name, part in parts.items()})
    restored = self.manager.restore(step, args=args)
    state = {name: restored[name] if name in parts else part for name, part in abstract.items()}
    for name in parts:
      if digest(state[name]) != meta["digest"][name]:
        raise CheckpointError(f"the {name} read do not match their digest")
    return state, meta

  def _put_aside(self, step: int, reason: str) -> None:
    target = self.bad_folder / f"{step}-{time.strftime('%Y%m%d-%H%M%S')}"
    logging.warning("checkpoint %d is damaged (%s): moved to %s", step, reason, target)
    self.manager.close()
    if multihost.is_main():
      self.bad_folder.mkdir(parents=True, exist_ok=True)
      (self.folder / str(step)).rename(target)
      (target / "REASON.txt").write_text(reason + "\n")
    multihost.barrier("checkpoint_put_aside")
    self.manager = self._open()

  def wait(self) -> None:
    self.manager.wait_until_finished()

  def close(self) -> None:
    self.manager.close()


def restore_params(
  workdir: str | Path, setup: Setup, *, which: str = "ema", step: int | None = None
) -> tuple[int, PyTree, PyTree, dict]:
  """(step, params, rest, meta) to sample or evaluate with; `which` is "ema" or "params"."""
  checkpointer = Checkpointer(workdir, read_only=True)
  try:
    found = checkpointer.restore({which: setup.abstract[which], "rest": setup.abstract["rest"]}, step=step)
  finally:
    checkpointer.close()
  if found is None:
    raise FileNotFoundError(f"no checkpoint in {checkpointer.folder}; train first")
  step, state, meta = found
  return step, state[which], state["rest"], meta


def check_config(workdir: str | Path, config: dict, identity: tuple[str, ...]) -> None:
  """Refuses a config whose `identity` keys differ from those of the run in `workdir`, or writes it."""
  path = Path(workdir) / "config.json"
  if path.exists():
    old, new = flatten(json.loads(path.read_text())), flatten(json.loads(json.dumps(config)))
    under = lambda key: any(key == name or key.startswith(name + ".") for name in identity)  # noqa: E731
    keys = sorted(key for key in {*old, *new} if under(key) and old.get(key) != new.get(key))
    if keys:
      shown = "; ".join(f"{key} was {old.get(key)!r}, now {new.get(key)!r}" for key in keys)
      raise ValueError(
        f"workdir {workdir} holds a run of another configuration ({shown}); use another --workdir"
      )
  multihost.barrier("config_checked")
  if multihost.is_main():
    partial = path.with_suffix(".tmp")
    partial.write_text(json.dumps(config, indent=2) + "\n")
    partial.replace(path)


def flatten(config: dict, prefix: str = "") -> dict:
  """{"a": {"b": 1}} -> {"a.b": 1}."""
  flat = {}
  for key, value in config.items():
    if isinstance(value, dict):
      flat |= flatten(value, f"{prefix}{key}.")
    else:
      flat[prefix + key] = value
  return flat
