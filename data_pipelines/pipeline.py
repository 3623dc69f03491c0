"""The batches of a run: batch k is a pure function of (index, seed, k)."""

import functools
import hashlib
import math
from collections.abc import Iterator

import grain
import numpy as np
from absl import flags

from data_pipelines import sizes, texts
from data_pipelines.config import DataConfig, batch_spec
from data_pipelines.latents import as_wanted
from data_pipelines.loader import RowLoader, Tokenize, Unread
from data_pipelines.sources.base import SampleInfo, Source, places_of
from data_pipelines.sources.registry import build_source
from data_pipelines.summary import Report, describe
from data_pipelines.workers import Deaths, Notes
from sora_jax.packing.geometry import ClipSpec
from sora_jax.packing.pack import stack_rows, tokens_of_samples
from sora_jax.packing.plan import RowPlan
from sora_jax.types import NO_SAMPLE, BatchSpec, TokenBatch

__all__ = ["DataConfig", "Pipeline", "batch_spec", "build_source"]

_ENDLESS = 2**31 - 1  # rows; grain wants a length
_SHOWN = 2**20  # samples, at most, of which all is known at once
_CHUNK = 2**20
_COUNTED, _EMBEDDED = 2**18, 64  # captions, at most, that a report is made from


class Pipeline:
  """One side of the split of a source, fitted to sizes, planned into rows and loaded.

  `split` is "train", "eval" (held out by a hash of the name) or "all". Held-out samples are read from their
  start, with their first caption and without prompts. `tokenize` is that of `texts.reader`.
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
    source = as_wanted(source, config)
    if config.text:
      texts.require(source, tokenize)
    self.source, self.config, self.spec, self.split = source, config, spec, split
    is_train = split != "eval"
    ids = train_ids = chosen_ids(source, config, split)
    if config.max_padding and split != "train":
      train_ids = chosen_ids(source, config, "train")
    self.fitted = sizes.fit(source, ids, config, spec, is_train=is_train, train_ids=train_ids)
    self.rejects = [(source.info(i).name, why) for i, why in self.fitted.rejects]
    if not len(self.fitted):
      raise ValueError(f"{source.name}: the {split} split has no sample (data.num_eval, data.eval_fraction)")
    names, counts, weights = _parts_of(source, self.fitted.ids)
    self.parts = names
    self._part_ends = self.fitted.ids[np.cumsum(counts) - 1].astype(np.int64) + 1
    self.plan = RowPlan(
      phases=self.fitted.phases,
      kinds=self.fitted.kinds,
      rows_per_step=spec.rows,
      row_tokens=spec.tokens,
      max_samples=spec.samples,
      seed=config.seed,
      method=config.packing,
      window=config.packing_window,
      cost=config.packing_cost,
      parts=counts,
      weights=weights if is_train else None,
    )
    self.loader = RowLoader(source, self.fitted, config, spec, tokenize, is_train=is_train)

  def __len__(self) -> int:
    return len(self.fitted)

  @property
  def max_tokens(self) -> int:
    return self.fitted.max_tokens

  @property
  def lengths(self) -> np.ndarray:
    return self.plan.lengths

  def shown(self, most: int = _SHOWN) -> np.ndarray:
    """Places of all samples, or of so many spread evenly over them."""
    return np.linspace(0, len(self) - 1, min(len(self), most)).astype(np.int64)

  def counts(self, batch: TokenBatch) -> dict[str, tuple[int, int]]:
    """Of each source of a mixture: (samples, tokens) in a batch."""
    is_sample = batch.sample_id_BN != NO_SAMPLE
    part_of = np.searchsorted(self._part_ends, batch.sample_id_BN[is_sample], side="right")
    samples = np.bincount(part_of, minlength=len(self.parts))
    tokens = np.bincount(
      part_of,
      tokens_of_samples(batch.segment_BL, len(batch.sample_id_BN[0]))[is_sample],
      minlength=len(self.parts),
    )
    return {name: (int(samples[p]), int(tokens[p])) for p, name in enumerate(self.parts)}

  def tally(self, batch: TokenBatch) -> dict[str, float]:
    """Metrics of a batch's rows, by the same names each time: tokens dropped, and a mixture by source."""
    whole = np.prod(batch.grid_BN3, axis=-1, dtype=np.int64).sum()
    tallied = {"dropped_tokens": float(whole - (batch.segment_BL > 0).sum())}
    if len(self.parts) > 1:
      for name, (samples, tokens) in self.counts(batch).items():
        tallied |= {f"samples/{name}": float(samples), f"tokens/{name}": float(tokens)}
    return tallied

  @functools.cached_property
  def infos(self) -> dict[int, SampleInfo]:
    """By sample of the source; of large sets those of `shown`."""
    return {i: self.source.info(i) for i in self.fitted.ids[self.shown()].tolist()}

  @functools.cached_property
  def specs(self) -> dict[int, ClipSpec]:
    """The largest size of each sample of `infos` in the last stage."""
    fitted, last = self.fitted, self.fitted.last
    return {int(fitted.ids[n]): last[fitted.kinds[n]] for n in self.shown()}

  @property
  def captions(self) -> list[str]:
    return [c for info in self.infos.values() for c in info.captions if c]

  def batches(self, start_step: int = 0, rows: slice | None = None) -> Iterator[TokenBatch]:
    """Endless batches from `start_step` on; `rows` are those of the global batch that this host holds."""
    first, stop, stride = (rows or slice(None)).indices(self.spec.rows)
    local = list(range(first, stop, stride))
    if not local:
      raise ValueError(f"{rows} holds none of the {self.spec.rows} rows of a batch")
    at = start_step * len(local)  # in the stream of this host's rows
    notes = Notes() if self.config.workers else None
    self.loader.notes = notes
    deaths, unread = Deaths(self.source, notes, self.loader.ended), Unread(self.loader)
    try:
      while True:
        iterator = self._rows_from(at, local)
        try:
          while True:
            batch = stack_rows([next(iterator) for _ in local])
            unread.add(batch)
            yield batch
            at += len(local)
        except RuntimeError as e:
          if not self.config.workers:
            raise
          deaths.explain(e)
        finally:
          if hasattr(iterator, "close"):
            iterator.close()
    finally:
      if notes:
        notes.close()

  def _rows_from(self, at: int, local: list[int]) -> Iterator[TokenBatch]:
    """Loaded rows of this host from place `at` of its stream on."""
    config = self.config
    source = _Rows(self.plan, self.loader, at, local)
    buffer = max(len(local) * config.prefetch, config.threads)
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
    return iter(loaded)

  def epoch_batches(self, rows: slice | None = None, max_steps: int = 0) -> list[TokenBatch]:
    """Every sample once, in batches, the last one filled up with empty rows: for held-out samples."""
    planned = self.plan.rows_of_epoch(0)
    steps = math.ceil(len(planned) / self.spec.rows)
    batches = []
    for step in range(min(steps, max_steps or steps)):
      mine = range(*(rows or slice(None)).indices(self.spec.rows))
      at = [step * self.spec.rows + r for r in mine]
      loaded = [self.loader.load(planned[r]) if r < len(planned) else self.spec.zeros(1) for r in at]
      batches.append(stack_rows(loaded))
    return batches

  def planned_samples(self, step: int) -> list[list[tuple[ClipSpec, str]]]:
    """(size, caption) of the samples of each row of a step; nothing is read."""
    rows = self.plan.rows_of_step(step)
    return [
      [(p.spec, self.loader.caption(p.info, p.epoch)) for p in self.loader.planned(row)] for row in rows
    ]

  def fingerprint(self) -> str:
    """Of all that decides which batch comes at which step."""
    c, fitted = self.config, self.fitted
    digest = hashlib.blake2b(digest_size=16)
    facts = (
      "plan 2", self.source.fingerprint(), self.split, self.spec, c.seed, c.packing, c.packing_window,
      c.packing_cost, c.token_drop.select, fitted.natives, fitted.stages, fitted.specs, self.plan.parts,
      [(p.step, p.order, p.table.tolist()) for p in fitted.phases],
    )  # fmt: skip
    facts += (self.loader.tokenize.hash,) if c.text else ()
    digest.update(repr(facts).encode())
    for column in (fitted.ids, fitted.kinds):
      for start in range(0, len(column), _CHUNK):
        digest.update(column[start : start + _CHUNK].tobytes())
    return digest.hexdigest()

  def report(self) -> Report:
    rejects = [*self.source.rejects, *self.rejects]
    return describe(
      self.source,
      self.fitted,
      self.plan,
      self.config,
      self.spec,
      self.loader.count_text,
      rejects=rejects,
      parts=self.parts,
      most_texts=self._countable(),
      max_text=getattr(self.loader.tokenize, "max_tokens", 0),
    )

  def _countable(self) -> int:
    """Captions to count for a report: embeddings whose length is not stored have to be made."""
    is_cheap = not self.config.text or all(texts.held_by(self.source))
    return _COUNTED if is_cheap else _EMBEDDED


def part_ends(source: Source) -> dict[str, int]:
  """Of the sources of a mixture: the first sample beyond each, by name."""
  parts = getattr(source, "parts", ())
  ends = np.cumsum([size for _, size, _ in parts]).tolist()
  return dict(zip((name for name, *_ in parts), ends)) if len(parts) > 1 else {}


class _Rows:
  """Grain's view: element e is a loaded row of this host; rows of one step lie side by side."""

  def __init__(self, plan: RowPlan, loader: RowLoader, first: int, local: list[int]):
    self.plan, self.loader, self.first, self.local = plan, loader, first, local

  def __len__(self) -> int:
    return _ENDLESS

  def __getitem__(self, e: int) -> TokenBatch:
    step, row = divmod(self.first + int(e), len(self.local))
    return self.loader.load(self.plan.row(step * self.plan.rows_per_step + self.local[row]))


def _parts_of(
  source: Source, ids: np.ndarray
) -> tuple[tuple[str, ...], tuple[int, ...], tuple[float, ...] | None]:
  """(names, samples used, weights) of the sources that a mixture is made of; ids of one follow on another."""
  parts = getattr(source, "parts", ((source.name, len(source), None),))
  ends = np.searchsorted(ids, np.cumsum([size for _, size, _ in parts]))
  counts = np.diff(ends, prepend=0).tolist()
  used = [(name, count, weight) for (name, _, weight), count in zip(parts, counts) if count]
  names, counts, weights = zip(*used)
  return names, counts, None if None in weights else weights


def chosen_ids(source: Source, config: DataConfig, split: str) -> np.ndarray:
  """Samples of one side of the split, ascending. A sample's side depends on its name alone (with
  `eval_fraction`: not even on the other samples)."""
  if split != "all" and (config.num_eval or config.eval_fraction):
    return _split(places_of(source), config, split)
  return np.arange(0 if split == "eval" else len(source), dtype=np.uint32)


def _split(place: np.ndarray, config: DataConfig, split: str) -> np.ndarray:
  assert split in ("train", "eval"), split
  count = len(place)
  if config.num_eval:
    if config.num_eval >= count:
      raise ValueError(
        f"data.num_eval={config.num_eval} leaves none of {count} samples to train on: lower it (0 = none)"
      )
    last = np.partition(place, config.num_eval - 1)[config.num_eval - 1]
    held_out = place < last
    held_out[np.flatnonzero(place == last)[: config.num_eval - np.count_nonzero(held_out)]] = True
  else:
    held_out = place / 2.0**64 < config.eval_fraction
  return np.flatnonzero(held_out == (split == "eval")).astype(np.uint32)
