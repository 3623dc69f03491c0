"""Batches of a pipeline, for tests."""

import itertools

import numpy as np

from data_pipelines.pipeline import Pipeline
from sora_jax.types import NO_SAMPLE, TokenBatch


def take(pipeline: Pipeline, count: int, start: int = 0, rows: slice | None = None) -> list[TokenBatch]:
  batches = pipeline.batches(start, rows)
  taken = list(itertools.islice(batches, count))
  batches.close()
  return taken


def assert_same(a: TokenBatch, b: TokenBatch) -> None:
  for name, value in vars(a).items():
    np.testing.assert_array_equal(value, getattr(b, name), err_msg=name)


def ids_of(batch: TokenBatch) -> list[int]:
  return [int(i) for i in batch.sample_id_BN.ravel() if i != NO_SAMPLE]
