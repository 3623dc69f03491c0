"""What the training loop is told."""

import dataclasses

from sora_jax.training import profile


@dataclasses.dataclass(frozen=True, kw_only=True)
class TrainConfig:
  num_steps: int
  accumulate: int = 1  # micro-batches per step
  log_every: int = 10
  eval_every: int = 0  # 0 = only at the end
  save_every: int = 500  # 0 = only at the end
  keep: int = 3  # checkpoints
  seed: int = 0
  max_skipped: int = 50  # bad steps in a row after which the run goes back to its last checkpoint
  max_rollbacks: int = 3  # to one checkpoint, before the run gives up
  spike_zscore: float = 0.0  # standard deviations of the log-loss above which a step is bad; 0 = never
  spike_window: int = 200  # steps that mean and deviation look back on
  hang_timeout_s: float = 600.0  # without a step; ten times that for compiling, saving, evaluating; 0 = never
  profile_steps: str = ""  # "10:13" = a profiler trace of steps 10, 11 and 12
  profile_num_steps: int = 3  # traced after SIGUSR1
  tensorboard: bool = True

  def __post_init__(self):
    if min(self.num_steps, self.accumulate, self.log_every, self.keep, self.max_skipped) < 1:
      raise ValueError(
        f"train: num_steps = {self.num_steps}, accumulate = {self.accumulate}, log_every = {self.log_every}, "
        f"keep = {self.keep} and max_skipped = {self.max_skipped} must be >= 1"
      )
    if min(self.spike_window, self.profile_num_steps) < 1:
      raise ValueError(
        f"train: spike_window = {self.spike_window} and profile_num_steps = {self.profile_num_steps} "
        "must be >= 1"
      )
    if min(self.max_rollbacks, self.spike_zscore, self.hang_timeout_s) < 0:
      raise ValueError(
        f"train: max_rollbacks = {self.max_rollbacks}, spike_zscore = {self.spike_zscore} and "
        f"hang_timeout_s = {self.hang_timeout_s} must be >= 0"
      )
    profile.parse(self.profile_steps)
