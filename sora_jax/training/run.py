"""A run under way, and what it does besides steps: compile, restore, go back, evaluate, call hooks."""

import contextlib
import dataclasses
import math
import os
import time
from collections.abc import Callable, Iterable
from pathlib import Path

import jax

from sora_jax.parallel import hostlog, multihost
from sora_jax.parallel import mesh as mesh_lib
from sora_jax.parallel.sentinel import Sentinel
from sora_jax.training import checkpoint, guards, metrics
from sora_jax.training import state as state_lib
from sora_jax.training import step as step_lib
from sora_jax.training.config import TrainConfig
from sora_jax.training.feed import batch_struct
from sora_jax.training.goodput import Goodput
from sora_jax.training.hooks import Hook, Moment
from sora_jax.training.profile import Profiler
from sora_jax.training.state import Setup
from sora_jax.training.watchdog import Watchdog
from sora_jax.types import PyTree, Sums, TokenBatch


@dataclasses.dataclass(frozen=True, kw_only=True)
class Run:
  setup: Setup
  config: TrainConfig
  checkpointer: checkpoint.Checkpointer
  writer: metrics.Writer
  window: metrics.Window
  workdir: Path
  eval_batches: Callable[[], Iterable[TokenBatch]] | None
  hooks: tuple[Hook, ...]
  resolved_config: dict
  listener: Sentinel
  watchdog: Watchdog
  account: Goodput
  profiler: Profiler
  skips: guards.Skips = guards.Skips()

  @contextlib.contextmanager
  def aside(self, kind: str):
    """Work that is not a step: counted apart, and given more time."""
    with self.watchdog.patience(kind), self.account.spend(kind), self.window.aside():
      yield

  def save(self, step: int, state: PyTree) -> None:
    with self.aside("save"):
      self.checkpointer.save(step, state, self.resolved_config, skips=self.skips.entries)
      self.account.write()
    hostlog.event("save", step=step)


@dataclasses.dataclass(frozen=True, kw_only=True)
class Programs:
  train_step: Callable
  eval_step: Callable


def compile_programs(run: Run) -> Programs:
  """The steps for these shapes and shardings, and no other: a later mismatch fails loudly."""
  began, config, batch = time.monotonic(), run.config, batch_struct(run.setup.task)
  run.writer.say("compiling the step")
  with run.aside("compile"):
    step = step_lib.make_train_step(
      run.setup,
      batch=batch,
      accumulate=config.accumulate,
      spike_zscore=config.spike_zscore,
      spike_window=config.spike_window,
    )
    compiled = step.lower(run.setup.abstract, batch).compile()
  memory = compiled.memory_analysis()
  gib = (memory.argument_size_in_bytes + memory.temp_size_in_bytes) / 2**30 if memory else math.nan
  run.writer.say(f"step compiled in {time.monotonic() - began:.1f} s; {gib:.2f} GiB per device")
  hostlog.event("compile", seconds=round(time.monotonic() - began, 2))
  return Programs(train_step=compiled, eval_step=step_lib.make_eval_step(run.setup, batch=batch))


def restore_or_init(run: Run) -> tuple[int, PyTree, Run]:
  """The newest sound checkpoint, or step 0; with the data that the run passed over so far."""
  with run.aside("restore"):
    found = run.checkpointer.restore(run.setup.abstract)
  if found is None:
    with run.aside("init"):
      step, state, meta = 0, state_lib.init_state(run.setup), {}
  else:
    step, state, meta = found
    devices = meta["devices"]
    run.writer.say(f"resumed at step {step} from {run.checkpointer.folder} (saved on {devices} devices)")
  with run.aside("restore"):
    # The file is newer than a checkpoint that the run went back to.
    entries = guards.load_skips(run.workdir)
    skips = guards.Skips.of(meta.get("skips", []) if entries is None else entries)
    multihost.barrier("skips_read")
  hostlog.event(
    "start", pid=os.getpid(), step=step, redo_until=run.account.reached, devices=jax.device_count()
  )
  return step, state, dataclasses.replace(run, skips=skips)


def go_back(run: Run, error: guards.GoBackError) -> tuple[int, PyTree, Run]:
  """To the newest sound checkpoint, with all data passed over up to where it was bad.

  Of checkpoints that stand at a multiple of `save_every` and were not made amid bad steps: the saves of a run
  that was told to stop are extra, and it shall go on as one that was not.
  """
  most, every = run.config.max_rollbacks, run.config.save_every
  if most == 0:
    raise guards.DivergedError(str(error))
  with run.aside("restore"):
    run.checkpointer.settle()
    regular = lambda step, meta: every and step % every == 0 and not meta["streak"]  # noqa: E731
    found = run.checkpointer.restore(run.setup.abstract, accept=regular)
    step, state, _ = (0, state_lib.init_state(run.setup), {}) if found is None else found
    times = run.skips.times(step)
    if times >= most:
      raise guards.DivergedError(f"{error}; the run went back to step {step} {times} times (max_rollbacks)")
    skips = run.skips.back_to(step, bad_until=error.step)
    if multihost.is_main():
      guards.save_skips(run.workdir, skips)
    multihost.barrier("skips_written")
    run.checkpointer.forget_after(step)
  run.writer.say(
    f"{error}: back to step {step}, passing over the data of steps {step} to {error.step - 1} "
    f"(time {times + 1} of {most})"
  )
  hostlog.event("rollback", step=step, bad_until=error.step, reason=str(error), times=times + 1)
  return step, state, dataclasses.replace(run, skips=skips)


def evaluate(run: Run, eval_step: Callable, state: PyTree, step: int) -> dict[str, float]:
  """Held-out means of the EMA and of the raw parameters."""
  if run.eval_batches is None:
    return {}
  setup, struct, sums = run.setup, batch_struct(run.setup.task), {"ema": None, "params": None}
  shardings = mesh_lib.batch_sharding(setup.mesh, struct)
  pending: list[tuple[str, Sums]] = []
  with run.aside("eval"):
    for batch in run.eval_batches():
      batch = multihost.to_global(batch, shardings, struct.segment_BL.shape[0])
      pending += [(which, eval_step(state[which], state["rest"], batch)) for which in sums]
    for which, new in jax.device_get(pending):
      sums[which] = metrics.add_sums(sums[which], new)
  values = metrics.means(sums["ema"] or {}, "eval/") | metrics.means(sums["params"] or {}, "eval_raw/")
  run.writer.scalars(step, values)
  shown = [f"{key} {values[key]:.4f}" for key in ("eval/loss", "eval_raw/loss") if key in values]
  run.writer.say(f"step {step} held out: {', '.join(shown) or 'no batches'}")
  return values


def call_hooks(run: Run, hooks: list[Hook], state: PyTree, step: int) -> None:
  model = lambda which: run.setup.model(state[which], state["rest"])  # noqa: E731
  with run.aside("hooks"), jax.transfer_guard("allow"):
    for hook in hooks:
      hook.run(Moment(step=step, model=model, writer=run.writer, workdir=run.workdir, mesh=run.setup.mesh))
