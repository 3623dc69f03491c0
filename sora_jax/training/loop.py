"""The training loop."""

import contextlib
import dataclasses
import math
import signal
import time
from collections.abc import Callable, Iterable, Iterator, Sequence
from pathlib import Path

import jax
import numpy as np
from jax.sharding import Mesh

from sora_jax.parallel import mesh as mesh_lib
from sora_jax.parallel import multihost, peaks
from sora_jax.parallel.mesh import MeshConfig
from sora_jax.parallel.rules import Rules
from sora_jax.training import checkpoint, metrics
from sora_jax.training import state as state_lib
from sora_jax.training import step as step_lib
from sora_jax.training.hooks import Hook, Moment
from sora_jax.training.optimizer import OptimizerConfig
from sora_jax.training.state import Setup
from sora_jax.types import PyTree, Sums, Task, TokenBatch

Batches = Callable[
  [int], Iterator[TokenBatch]
]  # first step -> this process's rows of that step and all later ones


class DivergedError(ArithmeticError):
  """Too many steps in a row were not finite."""


@dataclasses.dataclass(frozen=True, kw_only=True)
class TrainConfig:
  num_steps: int
  accumulate: int = 1  # micro-batches per step
  log_every: int = 10
  eval_every: int = 0  # 0 = only at the end
  save_every: int = 500  # 0 = only at the end
  keep: int = 3  # checkpoints
  seed: int = 0
  max_skipped: int = 50  # steps in a row that are not finite before the run gives up
  tensorboard: bool = True

  def __post_init__(self):
    if min(self.num_steps, self.accumulate, self.log_every, self.keep, self.max_skipped) < 1:
      raise ValueError(
        f"train: num_steps = {self.num_steps}, accumulate = {self.accumulate}, log_every = {self.log_every}, "
        f"keep = {self.keep} and max_skipped = {self.max_skipped} must be >= 1"
      )


@dataclasses.dataclass(frozen=True, kw_only=True)
class FitResult:
  step: int
  loss: float  # mean of the last report; NaN where no step ran
  evals: dict[str, float]  # of the last evaluation
  preempted: bool  # stopped by SIGTERM, saved
  state: PyTree
  setup: Setup


def fit(
  task: Task,
  *,
  config: TrainConfig,
  optimizer: OptimizerConfig,
  mesh: MeshConfig | Mesh,
  train_batches: Batches,
  eval_batches: Callable[[], Iterable[TokenBatch]] | None = None,
  workdir: str | Path,
  resolved_config: dict,
  identity: tuple[str, ...] = ("model", "text", "data.patch"),
  hooks: Sequence[Hook] = (),
  rules: Rules | None = None,
) -> FitResult:
  """Trains `task` from the newest sound checkpoint of `workdir`, or from scratch, to `config.num_steps`.

  `resolved_config` is written beside the checkpoints; a workdir whose config differs under the `identity`
  keys is refused.
  """
  workdir, mesh = Path(workdir), mesh_lib.make_mesh(mesh)
  workdir.mkdir(parents=True, exist_ok=True)
  checkpoint.check_config(workdir, resolved_config, identity)
  setup = state_lib.make_setup(
    task, optimizer=optimizer, num_steps=config.num_steps, mesh=mesh, seed=config.seed, rules=rules
  )
  writer = metrics.Writer(workdir, num_steps=config.num_steps, tensorboard=config.tensorboard)
  writer.say(f"{task.name}: {setup.num_params:,} parameters on mesh {dict(mesh.shape)}")
  with contextlib.ExitStack() as stack:
    stack.callback(writer.close)
    checkpointer = checkpoint.Checkpointer(workdir, keep=config.keep)
    stack.callback(checkpointer.close)
    stack.enter_context(jax.set_mesh(mesh))
    start, state = _restore_or_init(setup, checkpointer, writer)
    result = FitResult(step=start, loss=math.nan, evals={}, preempted=False, state=state, setup=setup)
    if start >= config.num_steps:
      writer.say(f"nothing to do: {workdir} is finished at step {start} of {config.num_steps}")
      return result
    run = _Run(setup, config, checkpointer, writer, workdir, eval_batches, tuple(hooks), resolved_config)
    stop = stack.enter_context(_sigterm_flag())
    return _train(run, result, train_batches, stop)


@dataclasses.dataclass(frozen=True)
class _Run:
  setup: Setup
  config: TrainConfig
  checkpointer: checkpoint.Checkpointer
  writer: metrics.Writer
  workdir: Path
  eval_batches: Callable[[], Iterable[TokenBatch]] | None
  hooks: tuple[Hook, ...]
  resolved_config: dict


def _train(run: _Run, result: FitResult, train_batches: Batches, stop: list) -> FitResult:
  setup, config, writer, num_steps = run.setup, run.config, run.writer, run.config.num_steps
  start, state, evals, loss = result.step, result.state, {}, math.nan
  abstract_batch = batch_struct(setup.task)
  train_step = _compile(setup, config, abstract_batch, writer)
  eval_step = step_lib.make_eval_step(setup, batch=abstract_batch)
  window = metrics.Window(peaks.peak_flops(list(setup.mesh.devices.flat)))
  batches = train_batches(start)
  feed = _Feed(batches, setup, abstract_batch, window)
  last, skipped_in_a_row = None, 0

  def report(step: int) -> None:
    """Takes up the results of the step before `step`; waits for the device to finish it."""
    nonlocal last, loss, skipped_in_a_row
    if last is None:
      return
    scalars, stats = jax.device_get(last[0]), last[1]
    last = None
    window.add(scalars, stats)
    finite = np.isfinite(scalars["grad_norm"]) and np.isfinite(scalars["sums"]["loss"][0])
    skipped_in_a_row = 0 if finite else skipped_in_a_row + 1
    if skipped_in_a_row >= config.max_skipped:
      raise DivergedError(f"the loss was not finite for {skipped_in_a_row} steps in a row, up to step {step}")
    if step % config.log_every == 0 or step == num_steps:
      values = window.report()
      loss = values.get("loss", math.nan)
      writer.scalars(step, values)
      writer.progress(step, values)

  try:
    with jax.transfer_guard("disallow"):
      for step in range(start, num_steps + 1):
        # --- evaluate
        done = step == num_steps
        if done or (config.eval_every and step % config.eval_every == 0 and step > start):
          report(step)
          with window.aside():
            evals = _evaluate(run, eval_step, state, step)
        # --- save: before the batch is drawn, so that a checkpoint of step i resumes at batch i
        preempted = multihost.preempted(step, bool(stop))
        if done or preempted or (config.save_every and step % config.save_every == 0 and step > start):
          with window.aside():
            run.checkpointer.save(step, state, run.resolved_config)
        if done or preempted:
          break
        # --- draw the batch, step
        batch, stats = feed.take()
        state, scalars = train_step(state, batch)
        # While the device works: prepare the next batch and take up the results of the step before.
        if step + 1 < num_steps:
          feed.fill()
        report(step)
        last = (scalars, stats)
        # --- hooks; those of the last step wait until it is saved
        due = [hook for hook in run.hooks if step + 1 < num_steps and hook.due(step + 1, num_steps)]
        if due:
          report(step + 1)
          with window.aside():
            _call(run, due, state, step + 1)
    report(step)
    if done:
      _call(run, [hook for hook in run.hooks if hook.due(step, num_steps)], state, step)
  finally:
    if hasattr(batches, "close"):
      batches.close()
  run.checkpointer.wait()
  if preempted and not done:
    writer.say(f"told to stop: saved step {step} in {run.workdir}; the same command resumes")
  stopped = preempted and not done
  return dataclasses.replace(result, step=step, loss=loss, evals=evals, preempted=stopped, state=state)


class _Feed:
  """Keeps the next batch on the device."""

  def __init__(self, batches: Iterator[TokenBatch], setup: Setup, struct: TokenBatch, window: metrics.Window):
    self.batches, self.setup, self.window = iter(batches), setup, window
    self.rows = struct.segment_BL.shape[0]
    self.shardings = mesh_lib.batch_sharding(setup.mesh, struct)
    self.held = None

  def fill(self) -> None:
    with self.window.waiting():
      batch = next(self.batches, None)
    if batch is None:
      raise ValueError("the training data ended before train.num_steps; an endless stream is expected")
    stats = metrics.HostStats.of(batch, self.setup.task.flops_fn(batch))
    self.held = multihost.to_global(batch, self.shardings, self.rows), stats

  def take(self) -> tuple[TokenBatch, metrics.HostStats]:
    if self.held is None:
      self.fill()
    held, self.held = self.held, None
    return held


def batch_struct(task: Task) -> TokenBatch:
  """Shapes and types of the task's global batch."""
  spec = task.batch_spec
  # By way of no rows: the global batch of a pod would not fit this host.
  return jax.tree.map(lambda x: jax.ShapeDtypeStruct((spec.rows, *x.shape[1:]), x.dtype), spec.zeros(rows=0))


def _compile(setup: Setup, config: TrainConfig, batch: TokenBatch, writer: metrics.Writer) -> Callable:
  """The train step for these shapes and shardings, and no other: a later mismatch fails loudly."""
  began = time.monotonic()
  writer.say("compiling the step")
  step = step_lib.make_train_step(setup, batch=batch, accumulate=config.accumulate)
  compiled = step.lower(setup.abstract, batch).compile()
  memory = compiled.memory_analysis()
  gib = (memory.argument_size_in_bytes + memory.temp_size_in_bytes) / 2**30 if memory else math.nan
  writer.say(f"step compiled in {time.monotonic() - began:.1f} s; {gib:.2f} GiB per device")
  return compiled


def _restore_or_init(setup: Setup, checkpointer: checkpoint.Checkpointer, writer: metrics.Writer):
  found = checkpointer.restore(setup.abstract)
  if found is None:
    return 0, state_lib.init_state(setup)
  step, state, meta = found
  writer.say(f"resumed at step {step} from {checkpointer.folder} (saved on {meta['devices']} devices)")
  return step, state


def _evaluate(run: _Run, eval_step: Callable, state: PyTree, step: int) -> dict[str, float]:
  """Held-out means of the EMA and of the raw parameters."""
  if run.eval_batches is None:
    return {}
  setup, struct, sums = run.setup, batch_struct(run.setup.task), {"ema": None, "params": None}
  shardings = mesh_lib.batch_sharding(setup.mesh, struct)
  pending: list[tuple[str, Sums]] = []
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


def _call(run: _Run, hooks: list[Hook], state: PyTree, step: int) -> None:
  model = lambda which: run.setup.model(state[which], state["rest"])  # noqa: E731
  with jax.transfer_guard("allow"):
    for hook in hooks:
      hook.run(Moment(step=step, model=model, writer=run.writer, workdir=run.workdir, mesh=run.setup.mesh))


@contextlib.contextmanager
def _sigterm_flag():
  """A list that holds the signal once SIGTERM came; with several processes JAX itself listens for it."""
  seen: list = []
  if jax.process_count() > 1:
    yield seen
    return
  try:
    old = signal.signal(signal.SIGTERM, lambda number, frame: seen.append(number))
  except ValueError:  # not in the main thread: leave signals alone
    yield seen
    return
  try:
    yield seen
  finally:
    signal.signal(signal.SIGTERM, old)
