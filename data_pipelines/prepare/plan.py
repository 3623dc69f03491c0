"""Which clip goes where: a pure function of the accepted clips and the flags."""

import dataclasses
import hashlib
import math
from typing import Any

from data_pipelines.prepare.config import PrepareConfig, mark_of
from data_pipelines.prepare.inputs import Item
from data_pipelines.video_io import MediaInfo

_MARK = 1  # of the form of what is written; a change makes finished shards stale


@dataclasses.dataclass(frozen=True, kw_only=True)
class Sample:
  """A clip as it will be stored."""

  id: str
  item: Item
  whole: MediaInfo
  info: MediaInfo
  start_s: float
  duration_s: float
  crop: tuple[int, int, int, int] | None
  num_frames: int
  height: int
  width: int
  fps: float
  scores: dict[str, float]
  hashes: tuple[str, ...]


@dataclasses.dataclass(frozen=True, kw_only=True)
class Shard:
  bucket: str
  number: int
  count: int  # shards of the bucket
  mark: str  # changes when what it holds does
  samples: tuple[Sample, ...]

  @property
  def path(self) -> str:
    """Below the output folder."""
    return f"{self.bucket}/{self.number:05d}-of-{self.count:05d}.array_record"

  @property
  def key(self) -> str:
    return f"{self.bucket}-{self.number:05d}"


class UnfitError(Exception):
  def __init__(self, rule: str, detail: str):
    super().__init__(rule, detail)
    self.rule, self.detail = rule, detail


def sample_of(
  item: Item, result: dict[str, Any], clip: dict[str, Any], config: PrepareConfig
) -> tuple[str, Sample]:
  """(bucket, sample); raises UnfitError."""
  frames, height, width, fps = clip["native"]
  left, right, top, bottom = clip["crop"] or (0, width, 0, height)
  rate = min(clip["source_fps"], config.target_fps or math.inf) if frames > 1 else 0.0
  count = max(1, int(clip["duration_s"] * rate + 1e-3)) if rate else 1
  if not config.has("resize"):
    size, crop = (bottom - top, right - left), clip["crop"]
    bucket = "native"
  else:
    size = fit_bucket(bottom - top, right - left, config)
    crop = _center_crop((left, right, top, bottom), size)
    step = config.frame_step
    count = (count - 1) // step * step + 1
    least = max(d for d in config.durations if d <= count)
    count = least if config.cut_to_bucket else count
    bucket = f"t{least:04d}_h{size[0]:04d}_w{size[1]:04d}"
  crop = tuple(crop) if crop and tuple(crop) != (0, width, 0, height) else None
  facts = (item.name, clip["start_s"], clip["duration_s"], crop, count, size, rate)
  sample = Sample(
    id=hashlib.blake2b(repr(facts).encode(), digest_size=16).hexdigest(),
    item=item,
    whole=MediaInfo(**result["whole"]),
    info=MediaInfo(**result["info"]),
    start_s=clip["start_s"],
    duration_s=clip["duration_s"],
    crop=crop,
    num_frames=count,
    height=size[0],
    width=size[1],
    fps=rate if count > 1 else 0.0,
    scores=clip["scores"],
    hashes=tuple(clip["hashes"]),
  )
  return bucket, sample


def fit_bucket(height: int, width: int, config: PrepareConfig) -> tuple[int, int]:
  """(height, width) of the largest resolution that needs no more than `max_enlarge`, nearest in aspect."""
  best = None
  for side in sorted(config.resolutions):
    sizes = [_bucket_size(side, aspect, config.multiple) for aspect in config.aspects]
    size = min(sizes, key=lambda s: (abs(math.log(s[1] / s[0] * height / width)), s))
    if max(size[0] / height, size[1] / width) <= config.max_enlarge:
      best = size
  if best is None:
    raise UnfitError("small", f"{width}x{height}, --resolutions={','.join(map(str, config.resolutions))}")
  lost = 1 - math.exp(-abs(math.log(best[1] / best[0] * height / width)))
  if lost > config.max_crop:
    raise UnfitError(
      "aspect",
      f"{width}x{height} loses {100 * lost:.0f} % to {best[1]}x{best[0]}, --max_crop={config.max_crop:g}",
    )
  return best


def _bucket_size(side: int, aspect: str, multiple: int) -> tuple[int, int]:
  across, down = map(int, aspect.split(":"))
  ratio = across / down
  height = max(1, round(side / math.sqrt(ratio) / multiple)) * multiple
  width = max(1, round(side * math.sqrt(ratio) / multiple)) * multiple
  return height, width


def _center_crop(box: tuple[int, int, int, int], size: tuple[int, int]) -> tuple[int, int, int, int]:
  """The largest part of `box` (left, right, top, bottom) with the aspect of `size`, in its middle."""
  left, right, top, bottom = box
  height, width = bottom - top, right - left
  kept_width = min(width, max(1, round(height * size[1] / size[0])))
  kept_height = min(height, max(1, round(width * size[0] / size[1])))
  x, y = left + (width - kept_width) // 2, top + (height - kept_height) // 2
  return x, x + kept_width, y, y + kept_height


def shards_of(
  buckets: dict[str, list[Sample]], config: PrepareConfig, encoders: tuple[str, ...]
) -> list[Shard]:
  """Samples of a bucket in the order of their ids, so that neighbours of a source are apart."""
  shards = []
  for bucket in sorted(buckets):
    samples = sorted(buckets[bucket], key=lambda s: s.id)
    count = -(-len(samples) // config.shard_samples)
    for number in range(count):
      part = tuple(samples[number * len(samples) // count : (number + 1) * len(samples) // count])
      facts = [dataclasses.replace(s, item=dataclasses.replace(s.item, number=0)) for s in part]
      mark = mark_of((_MARK, config.write_mark(), encoders, config.patch, facts))
      shards.append(Shard(bucket=bucket, number=number, count=count, mark=mark, samples=part))
  return shards
