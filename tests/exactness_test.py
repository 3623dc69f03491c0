"""Every sample once an epoch, on any number of hosts, and exact continuation on another number of them."""

import collections
import dataclasses
import itertools
import logging
import os
import signal
from pathlib import Path

import pytest

from data_pipelines.pipeline import DataConfig, Pipeline, batch_spec
from data_pipelines.sources.synthetic import SyntheticSource
from sora_jax.packing.pack import stack_rows
from sora_jax.types import NO_SAMPLE, TokenBatch
from tests.batches import assert_same, ids_of, take

CONFIG = DataConfig(
  patch=(2, 8, 8),
  rows=9,
  row_tokens=96,
  max_tokens=48,
  row_samples=6,
  row_text_tokens=64,
  prefetch=1,
  threads=2,
  packing_window=60,
  packing_cost=(1.0, 0.01),
)
SAMPLES = 150


class Logged:
  """Synthetic samples; each reading leaves its number in a file, whichever process does it."""

  def __init__(self, log: str, deadly: int = -1):
    self._source, self._log, self._deadly = SyntheticSource(SAMPLES), log, deadly
    self.name, self.rejects = "logged", []
    self.info, self.fingerprint = self._source.info, self._source.fingerprint

  def __len__(self):
    return len(self._source)

  def load(self, i, spec, start_s=0.0):
    if i == self._deadly:
      os.kill(os.getpid(), signal.SIGKILL)
    with open(self._log, "ab") as f:
      f.write(b"%d\n" % i)
    return self._source.load(i, spec, start_s)


def tokenize(text: str) -> list[int]:  # at the top of the module, so that worker processes find it
  return [2, *text.encode()[:7]]


def make(log, deadly=-1, **changes) -> Pipeline:
  config = dataclasses.replace(CONFIG, **changes)
  return Pipeline(Logged(str(log), deadly), config, batch_spec(config), tokenize)


def opened(log) -> collections.Counter:
  return collections.Counter(int(n) for n in Path(log).read_text().split()) if Path(log).exists() else {}


def slices(rows: int, hosts: int) -> list[slice]:
  """Rows of each host, as even as they go."""
  ends = [rows * h // hosts for h in range(hosts + 1)]
  return [slice(a, b) for a, b in itertools.pairwise(ends)]


@pytest.fixture(scope="module")
def whole(tmp_path_factory) -> list[TokenBatch]:
  """Three epochs and more, on one host."""
  pipeline = make(tmp_path_factory.mktemp("whole") / "log")
  rows = 3 * pipeline.plan.windows_per_epoch * pipeline.plan.rows_per_window
  return take(pipeline, -(-rows // CONFIG.rows) + 2)


@pytest.mark.parametrize("hosts", [1, 2, 4, 7])
def test_three_epochs_on_any_number_of_hosts(tmp_path, whole, hosts):
  parts = []
  for h, rows in enumerate(slices(CONFIG.rows, hosts)):
    pipeline = make(tmp_path / str(h), cache_mb=0)
    parts.append(take(pipeline, len(whole), rows=rows))
    loaded = collections.Counter(i for batch in parts[-1] for i in ids_of(batch))
    # Only its own records, each as often as its rows hold it; a little more was loaded ahead.
    ahead = opened(tmp_path / str(h)) - loaded
    assert not loaded - opened(tmp_path / str(h))
    assert ahead.total() <= (rows.stop - rows.start) * CONFIG.prefetch * 6 + CONFIG.threads * 6
  for batch, *pieces in zip(whole, *parts):
    assert_same(batch, stack_rows(pieces))
  plan = pipeline.plan
  count = 3 * plan.windows_per_epoch * plan.rows_per_window
  rows = [ids_of_row(batch, b) for batch in whole for b in range(CONFIG.rows)][:count]
  assert collections.Counter(itertools.chain(*rows)) == dict.fromkeys(range(SAMPLES), 3)


def ids_of_row(batch: TokenBatch, b: int) -> list[int]:
  return [int(i) for i in batch.sample_id_BN[b] if i != NO_SAMPLE]


@pytest.mark.parametrize("step,hosts", [(1, 7), (13, 2), (20, 4), (29, 1)])
def test_resuming_on_another_number_of_hosts_continues_exactly(tmp_path, whole, step, hosts):
  parts = [take(make(tmp_path / "log"), 4, step, rows) for rows in slices(CONFIG.rows, hosts)]
  for batch, *pieces in zip(whole[step:], *parts):
    assert_same(batch, stack_rows(pieces))


def test_worker_processes_give_the_same_rows(tmp_path, whole):
  parts = [take(make(tmp_path / "log", workers=2, threads=1), 5, 11, rows) for rows in slices(CONFIG.rows, 2)]
  for batch, *pieces in zip(whole[11:], *parts):
    assert_same(batch, stack_rows(pieces))


def test_a_worker_that_dies_is_reported_and_its_sample_counted(tmp_path, whole, caplog):
  deadly = ids_of(whole[2])[3]
  pipeline = make(tmp_path / "log", deadly, workers=2, threads=1)
  with caplog.at_level(logging.WARNING):
    taken = take(pipeline, 6)
  name = pipeline.source.info(deadly).name
  assert any(f"a worker process died loading {name}: padding instead" in r.message for r in caplog.records)
  assert sum(int(b.unreadable_B.sum()) for b in taken) == 1
  for a, b in zip(whole, taken):  # all else is as it would be
    assert [i for i in ids_of(a) if i != deadly] == ids_of(b)
  assert list(pipeline.loader.ended) == [deadly]


def test_hosts_plan_alike(tmp_path):
  prints = {make(tmp_path / "log").fingerprint() for _ in range(2)}
  assert len(prints) == 1
  changes = [{"packing_window": 50}, {"curriculum": ((0, 24), (9, 48))}, {"token_drop": {"rate": 0.5}}]
  prints |= {make(tmp_path / "log", **c).fingerprint() for c in changes}
  assert len(prints) == 4
