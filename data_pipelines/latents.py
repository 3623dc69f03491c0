"""`data.latents`: a run on latents, encoded while training or before, with the same batches either way."""

import dataclasses
from typing import Any, Protocol

import jax
import numpy as np

from data_pipelines.config import DataConfig
from data_pipelines.named import named
from data_pipelines.sources.base import SampleInfo, Sizes, Source, require_encoder, sizes_of
from sora_jax.packing.geometry import ClipSpec

DTYPE = np.float16  # of a batch


class Encoder(Protocol):
  """What "package.module:Class" names; made without arguments, in every worker process anew."""

  hash: str  # of weights and settings: another one gives other latents
  channels: int
  factors: tuple[int, int, int]  # frames, height and width in pixels of a latent cell

  def latent_frames(self, num_frames: int) -> int:
    """Of a clip: with a causal encoder 1 + (num_frames - 1) // factors[0]."""
    ...

  def encode(self, frames_THWC: np.ndarray) -> np.ndarray:
    """uint8 (T, H, W, 3) -> float (t, h, w, channels)."""
    ...


def load_encoder(name: str) -> Encoder:
  make = named(name, f"data.latents={name!r}")
  try:
    encoder = make()
  except (ImportError, AttributeError, TypeError) as e:
    raise ValueError(f"data.latents={name!r}: {e}") from e
  if missing := [
    k for k in ("hash", "channels", "factors", "latent_frames", "encode") if not hasattr(encoder, k)
  ]:
    raise ValueError(f"data.latents={name!r} has no {', '.join(missing)}: see data_pipelines/latents.py")
  return encoder


def as_wanted(source: Source, config: DataConfig) -> Source:
  """The source, if it holds what `data.latents` asks for; pixels are encoded where it names an encoder."""
  held = getattr(source, "encoder_hash", "")
  encoder = load_encoder(config.latents) if ":" in config.latents else None
  wanted = encoder.hash if encoder else config.latents
  if encoder and encoder.channels != config.latent_channels:
    raise ValueError(
      f"data.latents={config.latents!r} makes {encoder.channels} channels, data.latent_channels is "
      f"{config.latent_channels}"
    )
  if encoder and not held:
    return EncodedSource(source, config.latents)
  require_encoder(source.name, held, wanted)
  channels = getattr(source, "channels", 0)
  if wanted and channels and channels != config.latent_channels:
    raise ValueError(
      f"{source.name} holds latents of {channels} channels, data.latent_channels is {config.latent_channels}"
    )
  return source


class EncodedSource:
  """Latents of a source of pixels: each sample is encoded whole, then cut in time, as if stored before."""

  def __init__(self, source: Source, encoder: str):
    self.source, self._encoder_name, self._encoder = source, encoder, load_encoder(encoder)
    self.name, self.rejects, self.encoder_hash = source.name, source.rejects, self._encoder.hash
    self.notes, self.form = getattr(source, "notes", []), getattr(source, "form", "")
    for name in (
      "parts",
      "names",
      "places",
      "faults",
      "text_encoder_hash",
      "text_encoder_hashes",
      "text",
      "text_tokens",
    ):
      if hasattr(source, name):
        setattr(self, name, getattr(source, name))

  def __reduce__(self):
    return (EncodedSource, (self.source, self._encoder_name))

  def __len__(self) -> int:
    return len(self.source)

  def sizes(self) -> Sizes:
    frames, height, width, fps = sizes_of(self.source)
    unique, inverse = np.unique(frames, return_inverse=True)
    frames = np.array([self._encoder.latent_frames(int(n)) for n in unique], np.int32)[inverse]
    _, down, across = self._encoder.factors
    rates = np.where(frames > 1, np.asarray(fps, np.float64) / self._encoder.factors[0], 0.0)
    return Sizes(frames, np.maximum(height // down, 1), np.maximum(width // across, 1), rates)

  def info(self, i: int) -> SampleInfo:
    info = self.source.info(i)
    frames = self._encoder.latent_frames(info.num_frames)
    over, down, across = self._encoder.factors
    return dataclasses.replace(
      info,
      num_frames=frames,
      height=max(info.height // down, 1),
      width=max(info.width // across, 1),
      fps=info.fps / over if frames > 1 else 0.0,
    )

  def load(self, i: int, spec: ClipSpec, start_s: float = 0.0) -> np.ndarray:
    info = self.source.info(i)
    _, down, across = self._encoder.factors
    whole = ClipSpec(info.num_frames, spec.height * down, spec.width * across, info.fps)
    frames = self.source.load(i, whole)
    with jax.transfer_guard("allow"):  # the training loop forbids what an encoder on a device must do
      latents = np.asarray(self._encoder.encode(frames))
    first = round(start_s * spec.fps)
    return latents[first : first + spec.num_frames]

  def fingerprint(self) -> str:
    return f"{self.source.fingerprint()}:{self.encoder_hash}"


def rounded(values: np.ndarray, where: str) -> np.ndarray:
  """Latents as batches have them: those made now hold no more than those that were stored."""
  if values.dtype == DTYPE:
    return values
  with np.errstate(over="ignore"):
    kept = values.astype(DTYPE)
  if not np.isfinite(kept).all():
    raise ValueError(f"the latents of {where} have values that float16 cannot hold")
  return kept


def cut_to_size(
  native: tuple[int, int, int, float], patch: Any, max_tokens: int, max_frames: int
) -> ClipSpec:
  """Latents are cut in time alone."""
  frames, height, width, fps = native
  pt, ph, pw = patch
  area = (height // ph) * (width // pw)
  if height % ph or width % pw:
    raise ValueError(f"latents of {height}x{width} cells (HxW) are not divisible by the patch {ph}x{pw}")
  if area > max_tokens:
    raise ValueError(
      f"a frame of {height}x{width} latent cells has {area} tokens, above {max_tokens}, and cannot be resized"
    )
  frames = min(frames, max_frames or frames, pt * (max_tokens // area))
  frames = frames // pt * pt if frames >= pt else frames
  return ClipSpec(frames, height, width, fps if frames > 1 else 0.0)
