"""The batches of a run: batch k is a pure function of (index, seed, k)."""

import hashlib
import math
from collections.abc import Iterator

import grain
import numpy as np
from absl import flags

from data_pipelines import sizes
from data_pipelines.config import DataConfig, batch_spec
from data_pipelines.loader import RowLoader, Tokenize
from data_pipelines.sources.base import SampleInfo, Source
from data_pipelines.sources.registry import build_source
from data_pipelines.summary import Report, describe
from sora_jax.packing.geometry import num_tokens
from sora_jax.packing.pack import stack_rows
from sora_jax.packing.plan import RowPlan
from sora_jax.types import BatchSpec, TokenBatch

__all__ = ["DataConfig", "Pipeline", "batch_spec", "build_source"]

_ENDLESS = 2**31 - 1  # rows; grain wants a length


class Pipeline:
  """One side of the split of a source, fitted to sizes, planned into rows and loaded.

  `split` is "train", "eval" (held out by a hash of the name) or "all". Held-out samples are read from their
  start, with their first caption and without prompts.
  """

  def __init__(
    self,
    source: Source,
    config: DataConfig,
    spec: BatchSpec,
    tokenize: Tokenize,
    *,
    split: str = "train",
  ):
    if spec.channels != config.channels:
      raise ValueError(
        f"the model takes {spec.channels} channels a patch, data.patch={config.patch} has {config.channels}"
      )
    self.source, self.config, self.spec, self.split = source, config, spec, split
    everything = {i: source.info(i) for i in range(len(source))}
    chosen = split_ids(everything, config, split)
    self.max_tokens = sizes.lower_max_tokens(
      [everything[i] for i in split_ids(everything, config, "train")], config, spec
    )
    self.infos, self.specs, self.rejects = sizes.fit_all(
      {i: everything[i] for i in chosen}, config, self.max_tokens
    )
    if not self.infos:
      raise ValueError(f"{source.name}: the {split} split has no sample (data.num_eval, data.eval_fraction)")
    self._ids = np.fromiter(self.infos, np.int64)
    self.lengths = np.array([num_tokens(self.specs[i], config.patch) for i in self._ids], np.int64)
    names = [info.name for info in self.infos.values()]
    self.plan = sizes.plan_rows(self.lengths, config, spec, names)
    self.loader = RowLoader(source, self.infos, self.specs, config, spec, tokenize, is_train=split != "eval")

  def __len__(self) -> int:
    return len(self.infos)

  @property
  def captions(self) -> list[str]:
    return [c for info in self.infos.values() for c in info.captions]

  def batches(self, start_step: int = 0, rows: slice | None = None) -> Iterator[TokenBatch]:
    """Endless batches from `start_step` on; `rows` are those of the global batch that this host holds."""
    first, stop, stride = (rows or slice(None)).indices(self.spec.rows)
    local = list(range(first, stop, stride))
    if not local:
      raise ValueError(f"{rows} holds none of the {self.spec.rows} rows of a batch")
    config, num_rows = self.config, len(local)
    source = _Rows(self.plan, self.loader, self._ids, start_step, local)
    buffer = max(num_rows * config.prefetch, config.threads)
    threads = grain.ReadOptions(
      num_threads=config.threads, prefetch_buffer_size=buffer if config.threads else 0
    )
    loaded = grain.MapDataset.source(source).to_iter_dataset(threads)
    if config.workers:
      if not flags.FLAGS.is_parsed():  # grain's worker processes read absl flags
        flags.FLAGS.mark_as_parsed()
      per_worker = -(-buffer // config.workers)
      loaded = loaded.mp_prefetch(
        grain.MultiprocessingOptions(num_workers=config.workers, per_worker_buffer_size=per_worker)
      )
    iterator = iter(loaded)
    try:
      while True:
        yield stack_rows([next(iterator) for _ in local])
    finally:
      if hasattr(iterator, "close"):
        iterator.close()

  def epoch_batches(self, rows: slice | None = None, max_steps: int = 0) -> list[TokenBatch]:
    """Every sample once, in batches, the last one filled up with empty rows: for held-out samples."""
    planned = self.plan.rows_of_epoch(0)
    steps = math.ceil(len(planned) / self.spec.rows)
    batches = []
    for step in range(min(steps, max_steps or steps)):
      mine = range(*(rows or slice(None)).indices(self.spec.rows))
      at = [step * self.spec.rows + r for r in mine]
      loaded = [
        self.loader.load(_with_ids(planned[r], self._ids)) if r < len(planned) else self.spec.zeros(1)
        for r in at
      ]
      batches.append(stack_rows(loaded))
    return batches

  def planned_samples(self, step: int) -> list[list[tuple[int, str]]]:
    """(id, caption) of the samples of each row of a step; nothing is read."""
    rows = [_with_ids(row, self._ids) for row in self.plan.rows_of_step(step)]
    return [[(i, self.loader.caption(self.infos[i], row.epoch)) for i in row.ids] for row in rows]

  def fingerprint(self) -> str:
    """Of all that decides which batch comes at which step."""
    c = self.config
    facts = (
      self.source.fingerprint(), self.split, self.spec, c.seed, c.packing, c.packing_window, c.packing_cost,
      tuple(self.specs.items()),
    )  # fmt: skip
    return hashlib.blake2b(repr(facts).encode(), digest_size=16).hexdigest()

  def report(self) -> Report:
    return describe(
      self.source,
      self.infos,
      self.specs,
      self.rejects,
      self.plan,
      self.spec,
      self.loader.tokenize,
      self.max_tokens,
    )


class _Rows:
  """Grain's view: element e is a loaded row; rows of one step lie side by side."""

  def __init__(self, plan: RowPlan, loader: RowLoader, ids: np.ndarray, start_step: int, local: list[int]):
    self.plan, self.loader, self.ids, self.start_step, self.local = plan, loader, ids, start_step, local

  def __len__(self) -> int:
    return _ENDLESS

  def __getitem__(self, e: int) -> TokenBatch:
    step, row = divmod(int(e), len(self.local))
    index = (self.start_step + step) * self.plan.rows_per_step + self.local[row]
    return self.loader.load(_with_ids(self.plan.row(index), self.ids))


def _with_ids(row, ids: np.ndarray):
  """Positions in the split to ids in the source."""
  return row._replace(ids=tuple(int(ids[i]) for i in row.ids))


def split_ids(infos: dict[int, SampleInfo], config: DataConfig, split: str) -> list[int]:
  """A sample's side depends on its name alone (with `eval_fraction`: not even on the other samples)."""
  if split == "all":
    return list(infos)
  assert split in ("train", "eval"), split
  place = {
    i: int.from_bytes(hashlib.blake2b(info.name.encode(), digest_size=8).digest(), "big") / 2**64
    for i, info in infos.items()
  }
  if config.num_eval:
    if config.num_eval >= len(infos):
      raise ValueError(f"data.num_eval={config.num_eval} leaves none of {len(infos)} samples to train on")
    held_out = set(sorted(infos, key=lambda i: (place[i], i))[: config.num_eval])
  else:
    held_out = {i for i in infos if place[i] < config.eval_fraction}
  return [i for i in infos if (i in held_out) == (split == "eval")]
