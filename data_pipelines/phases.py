"""What changes with the step: size caps of the curriculum, rates of token dropping."""

import dataclasses

from data_pipelines.config import DataConfig
from sora_jax.packing import token_drop


@dataclasses.dataclass(frozen=True)
class Stage:
  step: int  # from which it holds
  max_tokens: int  # 0 = a whole row
  max_frames: int  # 0 = no cap
  drop_rates: tuple[float, ...]  # that take turns


def stages_of(config: DataConfig, *, is_train: bool) -> tuple[Stage, ...]:
  """Of the run, in order; held-out samples are seen as at the end, undropped."""
  sizes = [
    (step, tokens, rest[0] if rest else config.max_frames)
    for step, tokens, *rest in config.curriculum or ((0, config.max_tokens),)
  ]
  if not is_train:
    return (Stage(0, *sizes[-1][1:], (0.0,)),)
  drops = token_drop.stages(config.token_drop)
  steps = sorted({step for step, *_ in sizes} | {step for step, _ in drops})
  return tuple(
    Stage(step, *[s for s in sizes if s[0] <= step][-1][1:], [d for d in drops if d[0] <= step][-1][1])
    for step in steps
  )
