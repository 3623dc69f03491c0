"""The keys of `config.data`."""

import dataclasses
from collections.abc import Mapping
from typing import Any

from sora_jax.packing.fit import METHODS
from sora_jax.packing.geometry import Patch
from sora_jax.packing.token_drop import TokenDrop
from sora_jax.types import BatchSpec


@dataclasses.dataclass(frozen=True, kw_only=True)
class DataConfig:
  # What is read.
  source: str = "synthetic"  # a path (see docs/data.md), a registered name or "package.module:MySource"
  source_kwargs: Mapping[str, Any] = dataclasses.field(default_factory=dict)  # of the last two
  format: str = ""  # of a path: "" = seen from it; else a name of docs/data.md
  data_root: str = ""  # where a manifest's relative paths also may start; "" = its own folder
  media_column: str = ""  # of a manifest; "" = the first known one
  caption_column: str = ""  # "" = the first known one; "long,short" = a caption from each
  captions_optional: bool = False  # a set without any caption is taken too
  allow_outside_root: bool = False  # follow links, ".." and absolute paths out of the data folder
  frame_rate: float = 24.0  # of folders of frames, which do not say
  min_size: int = 32  # pixels of the shorter side
  max_aspect: float = 8.0  # of the longer side to the shorter
  decode_limit_s: float = (
    120.0  # videos up to this long are decoded once for the index, to count what decodes
  )
  index_dir: str = ""  # "" = beside the data, or else in the user's cache folder
  num_samples: int = 100_000  # of the synthetic source
  sources: Mapping[str, Any] = dataclasses.field(default_factory=dict)  # several: see docs/data.md
  seed: int = 0  # of the order of samples, of where clips begin and of captions

  # Pixels, or latents of an encoder: its hash for a set prepared with it, "package.module:Class" for either.
  latents: str = ""  # an encoder of pixels: its hash, or "package.module:Class"
  latent_channels: int = 0  # of a latent cell, with data.latents

  # Captions as embeddings of an encoder that is not trained, named as that of latents; "" = ids of a
  # vocabulary learned from them.
  text: str = ""  # an encoder of captions: its hash, or "package.module:Class"
  text_width: int = 0  # of the embedding of a token, with data.text

  # How large a sample becomes: see packing.geometry.fit_size.
  patch: Patch = (1, 16, 16)  # frames, height, width of a token
  max_tokens: int = 0  # of one sample; 0 = a whole row
  max_padding: float = (
    0.0  # lower max_tokens, at most by half, until rows pad no more than this; 0 = leave it
  )
  max_frames: int = 0  # 0 = no cap
  target_fps: float = 0.0  # at most; 0 = native
  curriculum: tuple[tuple[int, ...], ...] = ()  # (step, max_tokens[, max_frames]) from each step on
  resolutions: tuple[float, ...] = (1.0,)  # of the side a sample would have; take turns, one an epoch
  token_drop: TokenDrop = dataclasses.field(default_factory=TokenDrop)
  random_start: bool = True  # where a clip is longer than what is read of it

  # Rows.
  rows: int = 8  # of one step, over all hosts
  row_tokens: int = 1024  # of a row
  row_samples: int = 16  # at most
  row_text_tokens: int = 256  # of all captions of a row
  packing: str = "best_fit"  # or "greedy"
  packing_window: int = 4096  # samples packed at once
  packing_cost: tuple[float, float] = (1.0, 0.0)  # a, b: rows are evened out by a * sum(l) + b * sum(l^2)

  # Captions: how often the first, the second, ... of a sample is taken; () = each as often.
  caption_weights: tuple[float, ...] = ()  # of the first, the second, ... of a sample

  # Prompts: with this probability the first frames of a video are given, not denoised.
  given_probability: float = 0.0  # that a video has frames given
  given_image_share: float = 0.5  # of these, only the first latent frame; the rest up to half of the frames

  # Held out, by a hash of the name.
  num_eval: int = 0  # samples held out
  eval_fraction: float = 0.0  # used where num_eval is 0

  # Loading.
  threads: int = 4  # per process
  workers: int = 0  # processes; 0 = threads of this one
  prefetch: int = 2  # batches loaded ahead
  cache_mb: int = 1024  # decoded and resized clips kept in memory, over all workers

  def __post_init__(self):
    # Lists and ConfigDicts come in from config files and command lines.
    object.__setattr__(self, "patch", tuple(int(p) for p in self.patch))
    object.__setattr__(self, "packing_cost", tuple(float(c) for c in self.packing_cost))
    object.__setattr__(self, "source_kwargs", dict(self.source_kwargs))
    object.__setattr__(self, "sources", {name: _part(name, part) for name, part in self.sources.items()})
    object.__setattr__(self, "curriculum", tuple(tuple(int(n) for n in entry) for entry in self.curriculum))
    object.__setattr__(self, "resolutions", tuple(float(r) for r in self.resolutions))
    object.__setattr__(self, "caption_weights", tuple(float(w) for w in self.caption_weights))
    if isinstance(self.token_drop, Mapping) or not isinstance(self.token_drop, TokenDrop):
      object.__setattr__(self, "token_drop", _token_drop(dict(self.token_drop)))
    if len(self.patch) != 3 or min(self.patch) < 1:
      raise ValueError(f"data.patch={self.patch} is not (frames, height, width)")
    for key in ("rows", "row_tokens", "row_samples", "row_text_tokens", "packing_window", "prefetch"):
      if getattr(self, key) < 1:
        raise ValueError(f"data.{key}={getattr(self, key)} is below 1")
    for key in ("max_tokens", "max_frames", "num_eval", "threads", "workers", "cache_mb"):
      if getattr(self, key) < 0:
        raise ValueError(f"data.{key}={getattr(self, key)} is below 0")
    if self.packing not in METHODS:
      raise ValueError(f"data.packing={self.packing!r} is none of {', '.join(METHODS)}")
    if self.max_tokens > self.row_tokens:
      raise ValueError(
        f"data.max_tokens={self.max_tokens} exceeds data.row_tokens={self.row_tokens}: "
        "a sample fills at most a row"
      )
    if self.frame_rate <= 0:
      raise ValueError(f"data.frame_rate={self.frame_rate} is not above 0")
    for key in ("given_probability", "given_image_share", "eval_fraction", "max_padding"):
      if not 0 <= getattr(self, key) <= 1:
        raise ValueError(f"data.{key}={getattr(self, key)} is not a share between 0 and 1")

    self._check_schedules()

  def _check_schedules(self):
    if self.latents and self.latent_channels < 1:
      raise ValueError(
        f"data.latents={self.latents!r} needs data.latent_channels, the channels of a latent cell"
      )
    if self.text and self.text_width < 1:
      raise ValueError(f"data.text={self.text!r} needs data.text_width, the size of a token's embedding")
    if self.latents and (self.resolutions != (1.0,) or self.target_fps or self.max_padding):
      raise ValueError(
        "latents cannot be resized: with data.latents leave data.resolutions, data.target_fps and "
        "data.max_padding as they are"
      )
    steps = [entry[0] for entry in self.curriculum if entry]
    if self.curriculum and (
      any(len(entry) not in (2, 3) for entry in self.curriculum)
      or steps[0] != 0
      or any(a >= b for a, b in zip(steps, steps[1:]))
    ):
      raise ValueError(
        f"data.curriculum={self.curriculum} is no list of (step, max_tokens) or (step, max_tokens, "
        "max_frames) with steps that begin at 0 and rise"
      )
    if any(not 0 < entry[1] <= self.row_tokens for entry in self.curriculum):
      raise ValueError(
        f"data.curriculum={self.curriculum}: max_tokens is from 1 to row_tokens={self.row_tokens}"
      )
    if not self.resolutions or not all(0 < r <= 1 for r in self.resolutions):
      raise ValueError(f"data.resolutions={self.resolutions} are not shares above 0, up to 1")
    if self.caption_weights and (min(self.caption_weights) < 0 or not sum(self.caption_weights)):
      raise ValueError(f"data.caption_weights={self.caption_weights} are not weights from 0 on")

  @property
  def channels(self) -> int:
    """Of a patch, of RGB pixels or latents."""
    return (self.latent_channels if self.latents else 3) * self.patch[0] * self.patch[1] * self.patch[2]


def _part(name: str, part: Any) -> dict[str, Any]:
  if not isinstance(part, Mapping):
    raise ValueError(f'data.sources.{name}={part!r} is no map such as {{"source": "clips", "weight": 3}}')
  return dict(part)


def _token_drop(keys: dict[str, Any]) -> TokenDrop:
  known = [f.name for f in dataclasses.fields(TokenDrop)]
  if unknown := sorted(set(keys) - set(known)):
    raise ValueError(f"data.token_drop has no key {', '.join(unknown)}; it has {', '.join(known)}")
  return TokenDrop(**keys)


def batch_spec(config: DataConfig) -> BatchSpec:
  return BatchSpec(
    rows=config.rows,
    tokens=config.row_tokens,
    channels=config.channels,
    samples=config.row_samples,
    text_tokens=config.row_text_tokens,
    text_width=config.text_width if config.text else 0,
  )
