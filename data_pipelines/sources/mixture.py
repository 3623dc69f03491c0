"""Several sources as one: `data.sources = {"clips": {"source": "clips", "weight": 3}, "stills": {...}}`."""

import bisect
import dataclasses
import hashlib
import itertools
from collections.abc import Iterator, Sequence

import numpy as np

from data_pipelines.config import DataConfig
from data_pipelines.sources.base import SampleInfo, Sizes, Source, faults_of, names_of, sizes_of
from sora_jax.packing.geometry import ClipSpec

# Of one source of a mixture; what it leaves out is as `config.data` says.
PART_KEYS = (
  "source", "source_kwargs", "format", "data_root", "media_column", "caption_column", "captions_optional",
  "allow_outside_root", "frame_rate", "min_size", "max_aspect", "decode_limit_s", "index_dir", "num_samples",
  "seed",
)  # fmt: skip


def part_configs(config: DataConfig) -> list[tuple[str, DataConfig, float | None]]:
  """(name, config, weight) of each source."""
  parts = []
  is_weighted = any("weight" in part for part in config.sources.values())
  for name, part in config.sources.items():
    keys = {key: value for key, value in part.items() if key != "weight"}
    if unknown := sorted(set(keys) - set(PART_KEYS)):
      raise ValueError(
        f"data.sources.{name} has no key {', '.join(unknown)}; it has weight, {', '.join(PART_KEYS)}"
      )
    weight = float(part.get("weight", 1.0)) if is_weighted else None
    if weight is not None and not 0 < weight < float("inf"):
      raise ValueError(f"data.sources.{name}.weight={weight:g} is not above 0; leave the source out")
    if "source" not in keys:
      raise ValueError(f"data.sources.{name} has no source")
    parts.append((name, dataclasses.replace(config, sources={}, **keys), weight))
  return parts


class MixedSource:
  """Samples of one source follow on those of another; names begin with that of their source.

  `parts` are (name, samples, weight): with weights, each is seen that much more often than by its size.
  """

  def __init__(self, named: Sequence[tuple[str, Source, float | None]]):
    self._sources = [source for _, source, _ in named]
    self.parts = tuple((name, len(source), weight) for name, source, weight in named)
    self._ends = list(itertools.accumulate(len(s) for s in self._sources))
    self.name = " + ".join(f"{name} ({source.name})" for name, source, _ in named)
    self.rejects = [(f"{n}/{r}", why) for n, s, _ in named for r, why in s.rejects]
    self.notes = [(f"{n}/{r}", why) for n, s, _ in named for r, why in getattr(s, "notes", [])]
    hashes = {getattr(s, "encoder_hash", ""): name for name, s, _ in named}
    if len(hashes) > 1:
      told = ", ".join(f"{name} {'latents of ' + h if h else 'pixels'}" for h, name in hashes.items())
      raise ValueError(f"data.sources mixes what one model cannot see at once: {told}")
    (self.encoder_hash,) = hashes
    self.channels = getattr(self._sources[0], "channels", 0)
    self.text_encoder_hashes = tuple(
      dict.fromkeys(getattr(source, "text_encoder_hash", "") for source in self._sources)
    )

  def __len__(self) -> int:
    return self._ends[-1]

  def place(self, i: int) -> tuple[int, int]:
    """(number of the source, sample in there)."""
    p = bisect.bisect_right(self._ends, i)
    return p, i - (self._ends[p] - len(self._sources[p]))

  def info(self, i: int) -> SampleInfo:
    p, k = self.place(i)
    info = self._sources[p].info(k)
    return dataclasses.replace(info, id=i, name=f"{self.parts[p][0]}/{info.name}")

  def sizes(self) -> Sizes:
    return Sizes(*(np.concatenate(columns) for columns in zip(*map(sizes_of, self._sources))))

  def names(self) -> Iterator[str]:
    for (part, *_), source in zip(self.parts, self._sources):
      yield from (f"{part}/{name}" for name in names_of(source))

  def faults(self) -> Iterator[str]:
    for source in self._sources:
      yield from faults_of(source)

  def load(self, i: int, spec: ClipSpec, start_s: float = 0.0) -> np.ndarray:
    p, k = self.place(i)
    return self._sources[p].load(k, spec, start_s)

  def text(self, i: int, caption: int = 0) -> np.ndarray | None:
    p, k = self.place(i)
    source = self._sources[p]
    return source.text(k, caption) if getattr(source, "text_encoder_hash", "") else None

  def text_tokens(self, i: int, caption: int = 0) -> int | None:
    p, k = self.place(i)
    source = self._sources[p]
    return source.text_tokens(k, caption) if getattr(source, "text_encoder_hash", "") else None

  def fingerprint(self) -> str:
    marks = repr([(part, s.fingerprint()) for part, s in zip(self.parts, self._sources)])
    return hashlib.blake2b(marks.encode(), digest_size=16).hexdigest()
