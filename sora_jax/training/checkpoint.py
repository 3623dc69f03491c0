"""Checkpoints that a digest vouches for."""

import contextlib
import json
import time
from collections.abc import Callable
from pathlib import Path

import flax
import jax
import orbax.checkpoint as ocp

from sora_jax.parallel import hostlog, multihost
from sora_jax.training import saving
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


class SaveError(RuntimeError):
  """A checkpoint could not be written."""


class Checkpointer:
  """Saves the parts of a state as items of one orbax step, and restores the newest step that is sound.

  With several processes all must call every method at the same point of the program; what befalls one of them
  is agreed on by all. A checkpoint that cannot be written (a full disk) is reported and the run goes on.
  """

  def __init__(self, workdir: str | Path, *, keep: int = 3, read_only: bool = False):
    self.folder = Path(workdir).absolute() / FOLDER
    self.bad_folder = Path(workdir).absolute() / BAD_FOLDER
    if read_only and not self.folder.is_dir():
      raise FileNotFoundError(f"no checkpoints in {workdir}: {self.folder} does not exist; train first")
    self.keep, self.read_only = keep, read_only
    self.rendezvous = saving.Rendezvous()
    self.under_way: int | None = None  # step that is being written
    self.error: Exception | None = None  # of the write under way
    self.manager = self._open()

  def _open(self) -> ocp.CheckpointManager:
    options = ocp.CheckpointManagerOptions(
      max_to_keep=None if self.read_only else self.keep,
      create=not self.read_only,
      read_only=self.read_only,
      cleanup_tmp_directories=not self.read_only,
      enable_async_checkpointing=True,
      async_options=ocp.AsyncOptions(barrier_sync_fn=self.rendezvous.barrier),
    )
    return ocp.CheckpointManager(self.folder, options=options)

  def _reopen(self) -> None:
    # Closing raises what the last write raised, which is known by now.
    with contextlib.suppress(Exception):
      self.manager.close()
    self.manager = self._open()

  def steps(self) -> list[int]:
    return sorted(self.manager.all_steps())

  def save(self, step: int, state: PyTree, config: dict, *, skips: tuple = ()) -> None:
    """Returns once the arrays are copied to the host; writing goes on behind."""
    self.settle()
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
      "skips": skips,
      "streak": int(state["counters"]["streak"]) if "counters" in state else 0,
      "config": config,
    }
    saved = {name: ocp.args.StandardSave(part) for name, part in items.items()}
    args = ocp.args.Composite(**saved, **{META: ocp.args.JsonSave(meta)})
    if lack := saving.lack_of_room(self.folder, items):
      self._report(step, lack)
      return
    self.rendezvous.begin()
    self.under_way = step
    try:
      self.manager.save(step, args=args, force=True)
    except Exception as error:  # orbax and tensorstore raise many types
      if jax.process_count() > 1:  # the others may wait within orbax: no way on together
        raise SaveError(f"checkpoint of step {step} could not be begun: {saving.reason_of(error)}") from error
      self.error = error
      self.settle()

  def poll(self) -> None:
    """Looks whether the write under way failed here, so that the other processes do not wait for it."""
    if self.under_way is not None and self.error is None:
      self.rendezvous.release_if_dead()

  def _finish(self) -> None:
    while self.manager.is_saving_in_progress():
      self.rendezvous.release_if_dead()
      time.sleep(0.01)
    try:
      self.manager.wait_until_finished()
    except Exception as error:  # orbax and tensorstore raise many types
      self.error = error

  def settle(self) -> bool:
    """Waits for the write under way; whether it succeeded in all processes. A collective."""
    if self.under_way is None:
      return True
    if self.error is None:
      self._finish()
    step, error = self.under_way, self.error
    self.under_way = self.error = None
    if not multihost.any_process(error is not None):
      self.failed = None
      return True
    mine = "" if error is None or isinstance(error, saving.PeerError) else saving.reason_of(error)
    reason = multihost.first_text(mine)
    self._reopen()
    self._report(step, reason or saving.reason_of(error))
    return False

  failed: str | None = None  # why the last checkpoint could not be written

  def _report(self, step: int, reason: str) -> None:
    self.failed = f"checkpoint of step {step} could not be written: {reason}"
    hostlog.say(f"warning: {self.failed}; training goes on, the next save tries again; kept: {self.steps()}")
    hostlog.event("save_failed", step=step, reason=reason)

  def wait(self) -> None:
    """Until all is written; raises where the last checkpoint is not."""
    self.settle()
    if self.failed:
      raise SaveError(f"{self.failed}; the checkpoints before it are whole: {self.steps()} in {self.folder}")

  def restore(
    self, abstract: PyTree, *, step: int | None = None, accept: Callable[[int, dict], bool] | None = None
  ) -> tuple[int, PyTree, dict] | None:
    """(step, state, meta) of the newest sound checkpoint; None where there is none at all.

    `abstract` may hold some of the parts only (say params and rest). A checkpoint that cannot be read
    or whose digest differs is moved aside. `step` asks for one step and no other; `accept(step, meta)` for
    some, and None comes where none of these is there.
    """
    wanted = self.steps()[::-1] if step is None else [step]
    if step is not None and step not in self.steps():
      raise FileNotFoundError(f"no checkpoint of step {step} in {self.folder}; there are {self.steps()}")
    passed = []
    for candidate in wanted:
      try:
        if accept and not accept(candidate, self._meta(candidate)):
          passed.append(candidate)
          continue
        return candidate, *self._read(candidate, abstract)
      except MismatchError as error:
        raise ValueError(str(error)) from None
      except CheckpointError as error:
        reason = str(error)
        if step is not None or self.read_only:
          hostlog.say(f"warning: checkpoint {candidate} in {self.folder} is damaged ({reason})")
        else:
          self._put_aside(candidate, reason)
    if step is not None:
      others = [s for s in self.steps() if s != step]
      raise CheckpointError(f"checkpoint {step} in {self.folder} is damaged; the others are {others}")
    if passed:
      return None
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
    """Each process reads its shards by itself, then all agree: a barrier amid reading might wait for ever."""
    folder = self.folder / str(step)
    parts = {name: part for name, part in abstract.items() if jax.tree.leaves(part)}
    found, problem = {}, ""
    try:
      meta = self._meta(step)
      for name, part in parts.items():
        self._check_shapes(step, name, shapes(part), meta["shapes"].get(name, {}))
      found = {name: saving.read_alone(folder / name, part) for name, part in parts.items()}
    except MismatchError:
      raise
    except Exception as error:  # orbax raises many types for a damaged file
      problem = saving.reason_of(error)
    if reason := multihost.first_text(problem):
      raise CheckpointError(reason)
    for name in parts:
      if digest(found[name]) != meta["digest"][name]:
        raise CheckpointError(f"the {name} read do not match their digest")
    return {name: found.get(name, part) for name, part in abstract.items()}, meta

  def _meta(self, step: int) -> dict:
    try:
      return json.loads((self.folder / str(step) / META / "metadata").read_text())
    except (OSError, ValueError) as error:
      raise CheckpointError(f"no readable {META}: {saving.reason_of(error)}") from None

  def forget_after(self, step: int) -> None:
    """Checkpoints of a course that the run has left."""
    for newer in [s for s in self.steps() if s > step]:
      self.manager.delete(newer)
    multihost.barrier("checkpoints_forgotten")

  def _check_shapes(self, step: int, name: str, new: dict, old: dict) -> None:
    if new != old:
      keys = sorted(key for key in {*old, *new} if old.get(key) != new.get(key))
      raise MismatchError(
        f"checkpoint {self.folder}/{step} does not fit this model or optimizer: {name}/{keys[0]} was "
        f"{old.get(keys[0])}, now {new.get(keys[0])} ({len(keys)} differ); use another workdir"
      )

  def _put_aside(self, step: int, reason: str) -> None:
    target = self.bad_folder / f"{step}-{time.strftime('%Y%m%d-%H%M%S')}"
    hostlog.say(f"warning: checkpoint {step} is damaged ({reason}): moved to {target}")
    hostlog.event("checkpoint_damaged", step=step, reason=reason)
    self.manager.close()
    multihost.barrier("checkpoint_found_bad")
    if multihost.is_main():
      self.bad_folder.mkdir(parents=True, exist_ok=True)
      (self.folder / str(step)).rename(target)
      (target / "REASON.txt").write_text(reason + "\n")
    multihost.barrier("checkpoint_put_aside")
    self.manager = self._open()

  def close(self) -> None:
    with contextlib.suppress(Exception):  # known from `wait`, or the run ends for another reason
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
