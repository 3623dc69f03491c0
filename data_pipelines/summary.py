"""What a data set holds and how it packs, in figures."""

import collections
import dataclasses
from collections.abc import Callable, Sequence

import numpy as np

from data_pipelines.config import DataConfig
from data_pipelines.sizes import Fitted, remedies
from data_pipelines.sources.base import SampleInfo, Source
from data_pipelines.sources.paths import one_line
from sora_jax.packing.geometry import num_tokens
from sora_jax.packing.pack import share_text
from sora_jax.packing.plan import RowPlan
from sora_jax.types import BatchSpec

_SECONDS = (1, 2, 5, 10, 30, 60, 600)
_LISTED = 50  # names printed of those skipped
_QUOTED = 3  # captions printed


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
  captions: list[str]  # some of them
  text_tokens: int
  text_tokens_cut: int  # by the capacity of rows, in the first epoch
  captions_cut: int
  captions_full: int  # as long as max_text, beyond which nothing of a caption is read; by a sample of them
  max_text: int  # tokens; 0 = no limit known
  packing: dict[str, dict[str, float]]  # per method, see RowPlan.stats
  method: str
  remedies: list[str]  # of much padding
  max_tokens: int
  parts: dict[str, dict[str, float]]  # by source of a mixture
  stages: list[dict[str, float]]  # of the run: from which step, caps, share of tokens dropped

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
      *([f"captions    {' | '.join(one_line(c) for c in self.captions)}"] if self.captions else []),
      f"text        {self.text_tokens} tokens; rows have no room for {self.text_tokens_cut} of them, "
      f"of {self.captions_cut} captions",
    ]
    if self.captions_full:
      lines.append(
        f"              {self.captions_full} captions reach text.max_tokens={self.max_text}: "
        "what is beyond is not read"
      )
    if len(self.parts) > 1:
      lines += [
        f"  of {name:<9} {p['samples']} samples, {100 * p['share_of_samples']:.1f} % of those seen, "
        f"{100 * p['share_of_tokens']:.1f} % of the tokens"
        for name, p in self.parts.items()
      ]
    if len(self.stages) > 1 or any(s["dropped"] for s in self.stages):
      lines += [
        f"from step   {s['step']}: at most {s['max_tokens']} tokens, "
        + (f"{s['max_frames']} frames, " if s["max_frames"] else "")
        + f"{100 * s['dropped']:.1f} % of them dropped"
        for s in self.stages
      ]
    for method, s in self.packing.items():
      mark = "  <- used" if method == self.method else ""
      lines.append(
        f"{method:<11} padding {100 * s['padding']:.2f} %, {s['rows']} rows an epoch, "
        f"{s['samples_per_row']:.1f} samples a row, dearest row of a step "
        f"{s['dearest_over_mean_of_step']:.2f}x the mean{mark}"
      )
    lines += [f"padding     {remedy}" for remedy in self.remedies]
    return "\n".join(lines)


def describe(
  source: Source,
  fitted: Fitted,
  plan: RowPlan,
  config: DataConfig,
  spec: BatchSpec,
  count_text: Callable[[SampleInfo], int],
  *,
  rejects: Sequence[tuple[str, str]],
  parts: Sequence[str],
  most_texts: int,
  max_text: int = 0,
) -> Report:
  """Of the samples as the end of the run sees them; captions of large sets by a sample of them."""
  counts = np.bincount(fitted.kinds, minlength=len(fitted.natives)).tolist()
  kinds = [(native, c) for native, c in zip(fitted.natives, counts) if c]
  videos = [(native, c) for native, c in kinds if native[0] > 1]
  shown = np.linspace(0, len(fitted) - 1, min(len(fitted), most_texts)).astype(np.int64)
  infos = [source.info(int(fitted.ids[n])) for n in shown]
  times = len(fitted) / len(shown)
  text_lengths = {int(n): count_text(info) for n, info in zip(shown, infos)}
  cut_tokens = cut_captions = 0
  for row in plan.rows_of_epoch(0) if times == 1 else ():
    texts = [text_lengths[i] for i in row.ids]
    lost = [c - k for c, k in zip(texts, share_text(texts, spec.text_tokens))]
    cut_tokens, cut_captions = cut_tokens + sum(lost), cut_captions + sum(n > 0 for n in lost)
  full, kept = _tokens(fitted, plan)
  packing = plan.stats()
  lengths = plan.lengths
  sizes, fits = collections.Counter(), collections.Counter()
  for (_, height, width, _), c in kinds:
    sizes[f"{width}x{height}"] += c
  for s, c in zip(fitted.last, counts):
    if s and c:
      fits[f"{s.width}x{s.height}x{s.num_frames}"] += c
  return Report(
    source=source.name + (f" ({form})" if (form := getattr(source, "form", "")) else ""),
    samples=len(fitted),
    videos=sum(c for _, c in videos),
    images=len(fitted) - sum(c for _, c in videos),
    without_caption=round(sum(not any(info.captions) for info in infos) * times),
    rejects=list(rejects),
    notes=list(getattr(source, "notes", [])),
    sizes=dict(sizes.most_common()),
    seconds=_durations([(native[0] / native[3], c) for native, c in videos if native[3]]),
    fitted=dict(fits.most_common()),
    tokens=int(lengths.sum(dtype=np.int64)),
    tokens_per_sample=(int(lengths.min()), float(np.median(lengths)), int(lengths.max())),
    captions=_some_captions(infos),
    text_tokens=round(sum(text_lengths.values()) * times),
    text_tokens_cut=cut_tokens,
    captions_cut=cut_captions,
    captions_full=round(sum(n >= max_text for n in text_lengths.values()) * times) if max_text else 0,
    max_text=max_text,
    packing=packing,
    method=plan.method,
    remedies=remedies(source, fitted, config, spec, packing[plan.method]["padding"]),
    max_tokens=fitted.max_tokens,
    parts=_parts(parts, fitted, plan),
    stages=[
      {"step": s.step, "max_tokens": s.max_tokens, "max_frames": s.max_frames, "dropped": 1 - k / f}
      for s, f, k in zip(fitted.stages, full, kept)
    ],
  )


def _some_captions(infos: Sequence[SampleInfo]) -> list[str]:
  """Of samples spread evenly: shows a column or a rule that was taken for a caption and is none."""
  captions = [caption for info in infos if (caption := next((c for c in info.captions if c), ""))]
  places = np.linspace(0, len(captions) - 1, min(_QUOTED, len(captions))).astype(int)
  return [captions[n] for n in places]


def _parts(names: Sequence[str], fitted: Fitted, plan: RowPlan) -> dict[str, dict[str, float]]:
  lengths, result = plan.lengths, {}
  for name, part, share in zip(names, plan.parts, plan.shares):
    own = slice(part.first, part.first + part.size)
    result[name] = {
      "samples": part.size,
      "tokens": int(lengths[own].sum(dtype=np.int64)),
      "share_of_samples": share,
      "epochs": part.passes / part.windows * plan.windows_per_epoch,  # in one of the part that takes longest
    }
  total = sum(r["tokens"] * r["epochs"] for r in result.values())
  for r in result.values():
    r["share_of_tokens"] = r["tokens"] * r["epochs"] / total
  return result


def _tokens(fitted: Fitted, plan: RowPlan) -> tuple[list[float], list[float]]:
  """(tokens of all samples, tokens kept) by stage, a mean over the variants."""
  counts = np.bincount(fitted.kinds, minlength=len(fitted.natives))
  kept = [float((p.table @ counts).mean()) for p in plan.phases]
  full = []
  for rows, stage in zip(fitted.specs, fitted.stages):
    rows = rows[: len(rows) // len(stage.drop_rates)]
    tokens = np.array([[num_tokens(s, fitted.patch) if s else 0 for s in row] for row in rows])
    full.append(float((tokens @ counts).mean()))
  return full, kept


def _durations(seconds: list[tuple[float, int]]) -> dict[str, int]:
  names = [f"<{s} s" for s in _SECONDS] + [f">={_SECONDS[-1]} s"]
  counts = collections.Counter()
  for length, count in seconds:
    counts[int(np.searchsorted(_SECONDS, length, side="right"))] += count
  return {names[k]: counts[k] for k in sorted(counts)}


def _counts(counts: dict[str, int], sort: bool = True, shown: int = 8) -> str:
  items = sorted(counts.items(), key=lambda kv: -kv[1]) if sort else list(counts.items())
  rest = f", {len(items) - shown} others" if len(items) > shown else ""
  return ", ".join(f"{name} ({n})" for name, n in items[:shown]) + rest
