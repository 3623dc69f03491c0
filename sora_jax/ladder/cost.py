"""What a config costs before it runs: parameters, and tokens and model FLOPs of its planned batches."""

import dataclasses
import functools
from collections.abc import Callable

import jax
import ml_collections
import numpy as np
from flax import nnx

from data_pipelines.pipeline import Pipeline
from sora_jax.packing.geometry import grid_of
from sora_jax.packing.pack import share_text
from sora_jax.tasks import registry
from sora_jax.types import Task, TokenBatch

MOST_STEPS = 20_000  # planned one by one; beyond, their mean goes on


@dataclasses.dataclass(frozen=True)
class Costs:
  """Of a config: `flops` and `tokens` of each of its first steps."""

  params: int
  flops: np.ndarray
  tokens: np.ndarray


def resolved(base: dict, overrides: dict) -> ml_collections.ConfigDict:
  """The base config with `overrides`; a key that it does not have is the user's mistake."""
  config = ml_collections.ConfigDict(base)
  for key, value in overrides.items():
    *sections, last = key.split(".")
    target = config
    for section in sections:
      target = target.get(section) if isinstance(target, ml_collections.ConfigDict) else None
    if not isinstance(target, ml_collections.ConfigDict) or last not in target:
      raise ValueError(f"the config has no key {key}")
    target[last] = value
  return config


def task_of(config: ml_collections.ConfigDict, pipeline: Pipeline) -> Task:
  tokenizer = pipeline.loader.tokenize
  return registry.build(config, batch_spec=pipeline.spec, vocab_size=tokenizer.vocab_size)


def num_params(task: Task) -> int:
  """All that is trained."""
  abstract = nnx.eval_shape(lambda: task.init(nnx.Rngs(0)))
  return sum(x.size for x in jax.tree.leaves(nnx.state(abstract, task.trainable)))


def planned(pipeline: Pipeline, steps: range) -> list[TokenBatch]:
  """The batches of some steps as far as FLOPs depend on them: grids and text segments, no pixels."""
  count = functools.cache(lambda caption: len(pipeline.loader.tokenize(caption)))
  return [_planned_step(pipeline, step, count) for step in steps]


def of(config: ml_collections.ConfigDict, pipeline: Pipeline, batches: list[TokenBatch]) -> Costs:
  task = task_of(config, pipeline)
  flops = np.array([np.sum(task.flops_fn(batch)) for batch in batches])
  tokens = np.array([int(np.prod(batch.grid_BN3, axis=-1).sum()) for batch in batches], np.int64)
  return Costs(num_params(task), flops, tokens)


def total_tokens(costs: Costs, steps: int) -> int:
  seen = int(costs.tokens[:steps].sum())
  return seen + round(max(0, steps - len(costs.tokens)) * float(costs.tokens.mean()))


def total_flops(costs: Costs, steps: int) -> float:
  return float(costs.flops[:steps].sum() + max(0, steps - len(costs.flops)) * costs.flops.mean())


def _planned_step(pipeline: Pipeline, step: int, count: Callable[[str], int]) -> TokenBatch:
  spec = pipeline.spec
  grid_BN3 = np.zeros((spec.rows, spec.samples, 3), np.int32)
  segment_BM = np.zeros((spec.rows, spec.text_tokens), np.int32)
  for b, samples in enumerate(pipeline.planned_samples(step)):
    for n, (size, _) in enumerate(samples):
      grid_BN3[b, n] = grid_of(size, pipeline.config.patch)
    kept = share_text([count(caption) for _, caption in samples], spec.text_tokens)
    segment_BM[b, : sum(kept)] = np.repeat(np.arange(1, len(kept) + 1), kept)
  nothing = dict.fromkeys(field.name for field in dataclasses.fields(TokenBatch))
  return TokenBatch(**nothing | {"grid_BN3": grid_BN3, "text_segment_BM": segment_BM})
