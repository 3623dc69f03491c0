"""Probes: what a linear layer reads off frozen features, and what it is judged by."""

import functools
from types import SimpleNamespace

import jax
import numpy as np
import pytest
from flax import nnx

from sora_jax.conditioning.text import TextConfig
from sora_jax.diffusion.objectives import ObjectiveConfig
from sora_jax.ladder import features, probe
from sora_jax.models.dit import DiTConfig
from sora_jax.nn import layers
from sora_jax.parallel.mesh import MeshConfig, make_mesh
from sora_jax.tasks import text_to_video
from sora_jax.types import BatchSpec
from tests import tiny_dit


def test_streams_end_in_the_output_and_leave_the_model_alone():
  model = features.random_weights(tiny_dit.task().init(nnx.Rngs(0)), 1)
  before, batch = probe.weights_digest(model), tiny_dit.batch(0)
  bits = probe.frozen(model)
  model.denoiser.final_modulation.w[...] *= 0  # the last modulation is then the layer norm alone
  t_BN = np.full(batch.fps_BN.shape, 0.1, np.float32)

  @functools.partial(jax.jit, static_argnums=0)
  def run(graph, state):
    model = nnx.merge(graph, state)
    denoiser, told = model.denoiser, model.text_encoder(batch)
    return model(batch.tokens_BLC, t_BN, batch), denoiser.streams(batch.tokens_BLC, t_BN, batch, *told)

  out, streams = run(*nnx.split(model))
  assert streams.shape == (2, 8, 32, 16)
  assert float(abs(streams[1] - streams[0]).max()) > 0.1
  last = model.denoiser.patch_out(layers.layer_norm(streams[1]))
  np.testing.assert_allclose(out, last, atol=1e-4)
  assert probe.weights_digest(model) != before and not all(map(np.array_equal, bits, probe.frozen(model)))


@functools.cache
def fake_run(samples: int, text_width: int = 0):
  """As far as features.embed reads a run."""
  spec = BatchSpec(rows=2, tokens=96, channels=384, samples=samples, text_tokens=16, text_width=text_width)
  data = SimpleNamespace(patch=(2, 8, 8), max_tokens=0, max_frames=0, target_fps=0.0)
  mesh = make_mesh(MeshConfig(), devices=jax.devices()[:1])
  return SimpleNamespace(spec=spec, data=data, mesh=mesh, diffusion=ObjectiveConfig(prediction="x0"))


@pytest.mark.parametrize("text_width", [0, 6])  # ids, embeddings
def test_features_do_not_depend_on_the_row(text_width):
  scenes = features.clips(11, seed=3)
  config = TextConfig(vocab_size=10, width=8, depth=1, heads=2)
  task = text_to_video.build(
    model=DiTConfig(width=16, depth=2, heads=2), text_config=config, diffusion=ObjectiveConfig(),
    batch_spec=fake_run(4, text_width).spec,
  )  # fmt: skip
  model = features.random_weights(task.init(nnx.Rngs(0)), 1)
  found = []
  for samples in (4, 1):
    run = fake_run(samples, text_width)
    batches = features.pack(run, scenes)
    found.append(features.embed(run, model, batches, noise_level=0.2, seed=0))
  assert found[0].shape == (2, 11, 3 * 16)
  np.testing.assert_allclose(found[0], found[1], atol=2e-4)
  assert np.ptp(found[0], axis=1).min() > 1e-3  # no feature is the same for all clips
  other = features.embed(run, model, batches, noise_level=0.2, seed=1)
  assert abs(other - found[1]).max() > 1e-2


def test_places_are_chosen_by_validation_clips_alone():
  rng = np.random.default_rng(0)
  y = rng.integers(2, size=240)
  split = probe.Split.of(240)
  good, lucky = (rng.standard_normal((240, 3)) for _ in range(2))
  good[:, 0] += 4 * y
  lucky[split.chosen :, 0] += 40 * y[split.chosen :]  # tells of the test clips alone
  places = {probe.Place(1, 0.1): lucky, probe.Place(2, 0.4): good}
  found = probe.best_of(places, {"label": np.array(["a", "b"])[y]})
  assert found["label"]["block"] == 2 and found["label"]["noise_level"] == 0.4
  assert found["mean"] == found["label"]["accuracy"] > 0.9


def scores(**of) -> dict:
  """Of one seed: accuracy of colour, shape, direction by network."""
  found = {}
  for name, values in of.items():
    found[name] = {label: {"accuracy": x} for label, x in zip(probe.LABELS, values)}
    found[name]["mean"] = float(np.mean(values))
  return found


def test_a_label_that_all_networks_read_is_not_judged_by():
  told = {"initial": (0.95, 0.45, 0.5), "random": (0.97, 0.5, 0.45), "pixels": (0.99, 0.4, 0.4)}
  one = probe.summary([scores(trained=(1.0, 0.6, 0.7), **told), scores(trained=(1.0, 0.7, 0.7), **told)])
  assert one["judged"] == ["shape", "direction"]
  np.testing.assert_allclose(one["leads"]["random"], [0.175, 0.225])
  np.testing.assert_allclose(one["leads_of_all"]["random"], (2.35 - 1.92) / 3)
  assert one["leads_as_it_should"]
  # One seed below the bar is enough to fail, and so is nothing to judge by.
  assert not probe.summary([scores(trained=(1.0, 0.6, 0.64), **told)])["leads_as_it_should"]
  all_read = {name: (0.9, 0.9, 0.9) for name in told}
  none = probe.summary([scores(trained=(1.0, 1.0, 1.0), **all_read)])
  assert none["judged"] == [] and not none["leads_as_it_should"]
