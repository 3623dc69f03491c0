"""What happens every so many steps besides training."""

import dataclasses
from collections.abc import Callable
from pathlib import Path

from flax import nnx
from jax.sharding import Mesh

from sora_jax.training.metrics import Writer


@dataclasses.dataclass(frozen=True, kw_only=True)
class Moment:
  """What a hook is shown. `model("ema")` and `model("params")` build the network, for the hook alone."""

  step: int
  model: Callable[[str], nnx.Module]
  writer: Writer
  workdir: Path
  mesh: Mesh


@dataclasses.dataclass(frozen=True, kw_only=True)
class Hook:
  """Calls `run` when `every` divides the step; after the last step too where `at_end`."""

  every: int  # 0 = only at the end
  run: Callable[[Moment], None]
  at_end: bool = True

  def due(self, step: int, num_steps: int) -> bool:
    return bool(self.every and step % self.every == 0) or (self.at_end and step == num_steps)
