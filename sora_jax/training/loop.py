"""The training loop."""

import contextlib
import dataclasses
import math
from collections.abc import Callable, Iterable, Iterator, Sequence
from pathlib import Path

import jax
from jax.sharding import Mesh

from sora_jax.parallel import hostlog, peaks
from sora_jax.parallel import mesh as mesh_lib
from sora_jax.parallel.mesh import MeshConfig
from sora_jax.parallel.rules import Rules
from sora_jax.parallel.sentinel import Sentinel
from sora_jax.training import checkpoint, goodput, guards, metrics, profile, scalars, watchdog
from sora_jax.training import run as run_lib
from sora_jax.training import state as state_lib
from sora_jax.training.config import TrainConfig
from sora_jax.training.feed import Feed
from sora_jax.training.guards import DivergedError
from sora_jax.training.hooks import Hook
from sora_jax.training.optimizer import OptimizerConfig
from sora_jax.training.run import Programs, Run
from sora_jax.training.state import Setup
from sora_jax.types import PyTree, Task, TokenBatch

__all__ = ["DivergedError", "FitResult", "TrainConfig", "fit"]

Batches = Callable[
  [int], Iterator[TokenBatch]
]  # first batch number -> this process's rows of that batch and all later ones


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
  listener: Sentinel | None = None,
  count: Callable[[TokenBatch], dict[str, float]] | None = None,
) -> FitResult:
  """Trains `task` from the newest sound checkpoint of `workdir`, or from scratch, to `config.num_steps`.

  `resolved_config` is written beside the checkpoints; a workdir whose config differs under the `identity`
  keys is refused. `listener` has been waiting for signals since before this call. `count` gives
  metrics of this process's rows of a batch, by the same names each time; reported are sums over a window.
  """
  workdir, mesh = Path(workdir), mesh_lib.make_mesh(mesh)
  workdir.mkdir(parents=True, exist_ok=True)
  with contextlib.ExitStack() as stack:
    if not hostlog.is_open_in(workdir):
      hostlog.open_in(workdir, jax.process_index())
      stack.callback(hostlog.close)
    if listener is None:
      listener = Sentinel().start()
      stack.callback(listener.close)
    dog = watchdog.Watchdog(config.hang_timeout_s).start()
    stack.callback(dog.close)
    with dog.patience("setting up"):
      account = goodput.Goodput(workdir)
      stack.callback(account.close)
      checkpoint.check_config(workdir, resolved_config, identity)
      setup = state_lib.make_setup(
        task, optimizer=optimizer, num_steps=config.num_steps, mesh=mesh, seed=config.seed, rules=rules
      )
      writer = metrics.Writer(workdir, num_steps=config.num_steps, tensorboard=config.tensorboard)
      stack.callback(writer.close)
      writer.say(f"{task.name}: {setup.num_params:,} parameters on mesh {dict(mesh.shape)}")
      checkpointer = checkpoint.Checkpointer(workdir, keep=config.keep)
      stack.callback(checkpointer.close)
    profiler = stack.enter_context(
      profile.profiling(workdir, steps=config.profile_steps, on_request=config.profile_num_steps)
    )
    listener.on_request = profiler.request
    window = metrics.Window(peaks.peak_flops(list(mesh.devices.flat)))
    stack.enter_context(jax.set_mesh(mesh))
    run = Run(
      setup=setup, config=config, checkpointer=checkpointer, writer=writer, window=window, workdir=workdir,
      eval_batches=eval_batches, hooks=tuple(hooks), resolved_config=resolved_config, listener=listener,
      watchdog=dog, account=account, profiler=profiler,
    )  # fmt: skip
    result = _train(run, train_batches, count)
    with dog.patience("finishing"):
      writer.scalars(result.step, account.metrics())
      writer.say(account.line())
    return result


def _train(run: Run, train_batches: Batches, count: Callable | None) -> FitResult:
  start, state, run = run_lib.restore_or_init(run)
  if start >= run.config.num_steps:
    run.writer.say(f"nothing to do: {run.workdir} is finished at step {start} of {run.config.num_steps}")
    return FitResult(step=start, loss=math.nan, evals={}, preempted=False, state=state, setup=run.setup)
  programs = run_lib.compile_programs(run)
  while True:
    feed = Feed(guards.stream(train_batches, run.skips, start), run.setup, run.window, count)
    try:
      return _steps(run, programs, feed, start, state)
    except guards.GoBackError as error:
      del state  # donated, and bad
      bad = error
    finally:
      feed.close()
    run.window.reset()
    start, state, run = run_lib.go_back(run, bad)


def _steps(run: Run, programs: Programs, feed: Feed, start: int, state: PyTree) -> FitResult:
  config, num_steps, window = run.config, run.config.num_steps, run.window
  last, loss, evals, streak = None, math.nan, {}, 0

  def report(step: int) -> None:
    """Takes up the results of the step before `step`; waits for the device to finish it."""
    nonlocal last, loss, streak
    if last is None:
      return
    values, stats = scalars.unpack(last[0]), last[1]
    last = None
    run.watchdog.beat()
    run.account.step_done(step)
    window.add(values, stats)
    if step % config.log_every == 0 or step == num_steps:
      means = window.report()
      loss = means.get("loss", math.nan)
      run.writer.scalars(step, means)
      run.writer.progress(step, means)
    streak = guards.judge(values, step, config.max_skipped)

  due = lambda every, step: every and step % every == 0 and step > start  # noqa: E731
  run.account.begin_steps()
  with jax.transfer_guard("disallow"):
    for step in range(start, num_steps + 1):
      done = step == num_steps
      stop = not done and run.listener.must_stop(step)
      # --- evaluate
      if done or (due(config.eval_every, step) and not stop):
        report(step)
        evals = run_lib.evaluate(run, programs.eval_step, state, step)
      # --- save: before the batch is drawn, so that a checkpoint of step i resumes at batch i
      if done or stop or due(config.save_every, step):
        report(step)
        if done or stop or not streak:  # amid bad steps the state may be bad too
          run.save(step, state)
      run.checkpointer.poll()
      if done or stop:
        break
      # --- draw the batch, step
      run.profiler.before(step)
      batch, stats = feed.take()
      state, packed = programs.train_step(state, batch)
      # While the device works: prepare the next batch and take up the results of the step before.
      if step + 1 < num_steps:
        waited = feed.fill()
        if packed.is_ready():  # the device has waited for data too
          run.account.add("data_wait", waited)
      report(step)
      last = (packed, stats)
      # --- hooks; those of the last step wait until it is saved
      hooks = [hook for hook in run.hooks if step + 1 < num_steps and hook.due(step + 1, num_steps)]
      if hooks:
        report(step + 1)
        run_lib.call_hooks(run, hooks, state, step + 1)
  if done:
    run_lib.call_hooks(run, [hook for hook in run.hooks if hook.due(step, num_steps)], state, step)
  with run.aside("save"):
    run.checkpointer.wait()
  if stop:
    run.writer.say(f"told to stop: saved step {step} in {run.workdir}; the same command resumes")
    hostlog.event("preempted", step=step)
  return FitResult(step=step, loss=loss, evals=evals, preempted=stop, state=state, setup=run.setup)
