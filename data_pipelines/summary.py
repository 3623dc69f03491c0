"""What a data set holds and how it packs, in figures."""

import collections
import dataclasses
from collections.abc import Callable, Sequence

import numpy as np

from data_pipelines.sources.base import SampleInfo, Source
from sora_jax.packing.geometry import ClipSpec
from sora_jax.packing.pack import share_text
from sora_jax.packing.plan import RowPlan
from sora_jax.types import BatchSpec

_SECONDS = (1, 2, 5, 10, 30, 60, 600)
_LISTED = 50  # names printed of those skipped


@dataclasses.dataclass(frozen=True, kw_only=True)
class Report:
  source: str
  samples: int
  videos: int
  images: int
  without_caption: int
  rejects: list[tuple[str, str]]  # (name, reason)
  notes: list[tuple[str, str]]  # files used in part
  sizes: dict[str, int]  # native WxH -> samples
  seconds: dict[str, int]  # duration -> videos
  fitted: dict[str, int]  # WxHxT as read -> samples
  tokens: int
  tokens_per_sample: tuple[int, float, int]  # min, median, max
  text_tokens: int
  text_tokens_cut: int  # by the capacity of rows, in the first epoch
  captions_cut: int
  packing: dict[str, dict[str, float]]  # per method, see RowPlan.stats
  method: str
  max_tokens: int

  def as_dict(self) -> dict:
    return dataclasses.asdict(self)

  def __str__(self) -> str:
    reasons = collections.Counter(reason.split(":")[0] for _, reason in self.rejects)
    low, median, high = self.tokens_per_sample
    lines = [
      f"source      {self.source}",
      f"used        {self.samples} samples: {self.videos} videos, {self.images} images; "
      f"{self.without_caption} without a caption",
      f"skipped     {len(self.rejects)}" + "".join(f"; {n} {reason}" for reason, n in reasons.most_common()),
      *(f"              {name}  {reason}" for name, reason in self.rejects[:_LISTED]),
      *([f"              and {len(self.rejects) - _LISTED} more"] if len(self.rejects) > _LISTED else []),
      *([f"used in part {len(self.notes)}"] if self.notes else []),
      *(f"              {name}  {note}" for name, note in self.notes[:_LISTED]),
      f"native size {_counts(self.sizes)}",
      f"duration    {_counts(self.seconds, sort=False)}",
      f"read as     {_counts(self.fitted)}",
      f"tokens      {self.tokens}; per sample {low} to {high}, median {median:g}, at most {self.max_tokens}",
      f"text        {self.text_tokens} tokens; rows have no room for {self.text_tokens_cut} of them, "
      f"of {self.captions_cut} captions",
    ]
    for method, s in self.packing.items():
      mark = "  <- used" if method == self.method else ""
      lines.append(
        f"{method:<11} padding {100 * s['padding']:.2f} %, {s['rows']} rows an epoch, "
        f"{s['samples_per_row']:.1f} samples a row, dearest row of a step "
        f"{s['dearest_over_mean_of_step']:.2f}x the mean{mark}"
      )
    return "\n".join(lines)


def describe(
  source: Source,
  infos: dict[int, SampleInfo],
  specs: dict[int, ClipSpec],
  rejects: Sequence[tuple[str, str]],
  plan: RowPlan,
  spec: BatchSpec,
  tokenize: Callable[[str], Sequence[int]],
  max_tokens: int,
) -> Report:
  lengths = plan.lengths[0]
  videos = [i for i in infos.values() if i.num_frames > 1]
  text_lengths = [len(tokenize(i.captions[0] if i.captions else "")) for i in infos.values()]
  cut_tokens = cut_captions = 0
  for row in plan.rows_of_epoch(0):
    counts = [text_lengths[i] for i in row.ids]
    lost = [c - k for c, k in zip(counts, share_text(counts, spec.text_tokens))]
    cut_tokens, cut_captions = cut_tokens + sum(lost), cut_captions + sum(n > 0 for n in lost)
  return Report(
    source=source.name + (f" ({form})" if (form := getattr(source, "form", "")) else ""),
    samples=len(infos),
    videos=len(videos),
    images=len(infos) - len(videos),
    without_caption=sum(not i.captions for i in infos.values()),
    rejects=[*source.rejects, *rejects],
    notes=list(getattr(source, "notes", [])),
    sizes=dict(collections.Counter(f"{i.width}x{i.height}" for i in infos.values()).most_common()),
    seconds=_durations([i.num_frames / i.fps for i in videos if i.fps]),
    fitted=dict(
      collections.Counter(f"{s.width}x{s.height}x{s.num_frames}" for s in specs.values()).most_common()
    ),
    tokens=int(lengths.sum()),
    tokens_per_sample=(int(lengths.min()), float(np.median(lengths)), int(lengths.max())),
    text_tokens=sum(text_lengths),
    text_tokens_cut=cut_tokens,
    captions_cut=cut_captions,
    packing=plan.stats(),
    method=plan.method,
    max_tokens=max_tokens,
  )


def _durations(seconds: list[float]) -> dict[str, int]:
  names = [f"<{s} s" for s in _SECONDS] + [f">={_SECONDS[-1]} s"]
  counts = collections.Counter(int(np.searchsorted(_SECONDS, s, side="right")) for s in seconds)
  return {names[k]: counts[k] for k in sorted(counts)}


def _counts(counts: dict[str, int], sort: bool = True, shown: int = 8) -> str:
  items = sorted(counts.items(), key=lambda kv: -kv[1]) if sort else list(counts.items())
  rest = f", {len(items) - shown} others" if len(items) > shown else ""
  return ", ".join(f"{name} ({n})" for name, n in items[:shown]) + rest
