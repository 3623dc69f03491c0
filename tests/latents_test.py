"""Latents encoded while training or before: the same batches, and none of another encoder."""

import dataclasses
import itertools
from types import SimpleNamespace

import numpy as np
import pytest

from configs import quickstart
from data_pipelines.pipeline import DataConfig, Pipeline, batch_spec
from data_pipelines.sources.base import Sizes
from data_pipelines.sources.synthetic import SyntheticSource
from sora_jax import train, trained
from sora_jax.packing.geometry import ClipSpec

CONFIG = DataConfig(
  latents="tests.latents_test:Mean",
  latent_channels=4,
  patch=(1, 1, 1),
  rows=3,
  row_tokens=64,
  max_tokens=40,
  row_samples=12,
  row_text_tokens=64,
  prefetch=1,
)


def tokenize(text: str) -> list[int]:
  return [1, len(text)]


class Mean:
  """A causal stand-in for a learned encoder: means of cells, the first frame on its own."""

  hash, channels, factors = "mean-8x8x2", 4, (2, 8, 8)

  def latent_frames(self, num_frames: int) -> int:
    return 1 + (num_frames - 1) // 2

  def encode(self, frames_THWC: np.ndarray) -> np.ndarray:
    T, H, W, _ = frames_THWC.shape
    count = self.latent_frames(T)
    cells = frames_THWC[: 2 * count - 1].reshape(-1, H // 8, 8, W // 8, 8, 3).mean((2, 4)) / 127.5 - 1
    out = np.empty((count, H // 8, W // 8, 4), np.float32)
    out[0, ..., :3] = cells[0]
    out[1:, ..., :3] = (cells[1::2] + cells[2::2]) / 2
    out[..., 3] = np.arange(count)[:, None, None]
    return out


class Stored:
  """Latents made before, in memory."""

  def __init__(self, source, encoder, encoder_hash=None):
    self.name, self.rejects, self._source = "stored", [], source
    self.encoder_hash = encoder_hash or encoder.hash
    infos = [source.info(i) for i in range(len(source))]
    self.latents = [
      encoder.encode(source.load(i, ClipSpec(f.num_frames, f.height // 8 * 8, f.width // 8 * 8, f.fps)))
      for i, f in enumerate(infos)
    ]
    self._rates = [f.fps / 2 if len(z) > 1 else 0.0 for f, z in zip(infos, self.latents)]

  def __len__(self):
    return len(self.latents)

  def sizes(self):
    shapes = np.array([z.shape for z in self.latents], np.int32)
    return Sizes(*shapes[:, :3].T, np.array(self._rates))

  def info(self, i):
    t, h, w, _ = self.latents[i].shape
    return dataclasses.replace(self._source.info(i), num_frames=t, height=h, width=w, fps=self._rates[i])

  def load(self, i, spec, start_s=0.0):
    first = round(start_s * spec.fps)
    return self.latents[i][first : first + spec.num_frames]

  def fingerprint(self):
    return "stored"


def make(source, **changes) -> Pipeline:
  config = dataclasses.replace(CONFIG, **changes)
  return Pipeline(source, config, batch_spec(config), tokenize)


def take(pipeline, count):
  batches = pipeline.batches(2)
  taken = list(itertools.islice(batches, count))
  batches.close()
  return taken


@pytest.mark.parametrize(
  "changes", [{}, {"max_frames": 2}, {"cache_mb": 0, "max_frames": 2}, {"patch": (1, 1, 3)}]
)
def test_encoded_before_or_while_training(changes):
  pixels = SyntheticSource(40)
  online, stored = make(pixels, **changes), make(Stored(pixels, Mean()), **changes)
  assert online.source.encoder_hash == stored.source.encoder_hash
  assert online.lengths.tolist() == stored.lengths.tolist()
  assert batch_spec(online.config).channels == 4 * np.prod(online.config.patch)
  for a, b in zip(take(online, 5), take(stored, 5)):
    assert (a.segment_BL > 0).any() and not a.unreadable_B.any()
    for name, value in vars(a).items():
      np.testing.assert_array_equal(value, getattr(b, name), err_msg=name)


def test_a_set_prepared_by_the_hash_alone():
  stored = Stored(SyntheticSource(10), Mean())
  assert len(make(stored, latents="mean-8x8x2")) == 10


def test_no_samples_are_drawn_of_what_nothing_decodes(capsys):
  config = quickstart.get_config("debug")
  assert train.grids(config, make(SyntheticSource(8)), None, tokenize) == ()
  assert "nothing decodes latents" in capsys.readouterr().err
  with pytest.raises(ValueError, match="runs/a was trained on latents .data.latents=tests.latents_test:Mean"):
    trained.require_pixels(SimpleNamespace(workdir="runs/a", data=CONFIG))


def test_another_encoder_is_refused_in_one_line():
  pixels = SyntheticSource(10)
  other = Stored(pixels, Mean(), "other")
  with pytest.raises(
    ValueError, match="stored holds latents of encoder other, the run wants latents of encoder mean"
  ):
    make(other)
  with pytest.raises(
    ValueError, match="synthetic holds pixels, the run wants latents of encoder abc: prepare it"
  ):
    make(pixels, latents="abc")
  with pytest.raises(ValueError, match="stored holds latents of encoder other, the run wants pixels"):
    make(other, latents="")
  with pytest.raises(ValueError, match="makes 4 channels, data.latent_channels is 8"):
    make(pixels, latent_channels=8)
  with pytest.raises(ValueError, match="data.latents='tests.latents_test:Gone'"):
    make(pixels, latents="tests.latents_test:Gone")
  with pytest.raises(ValueError, match="needs data.latent_channels"):
    make(pixels, latent_channels=0)
  with pytest.raises(ValueError, match="latents cannot be resized"):
    make(pixels, resolutions=(0.5, 1.0))


def test_what_does_not_fit_is_named():
  pipeline = make(SyntheticSource(60), max_tokens=12)
  assert pipeline.rejects and all("cannot be resized" in why for _, why in pipeline.rejects)
  assert len(pipeline) + len(pipeline.rejects) == 60
