"""Paths, predictions and samplers against what is known in closed form."""

import itertools

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from sora_jax.diffusion import objectives, paths, samplers
from sora_jax.diffusion.objectives import ObjectiveConfig

MEAN, STD = 0.7, 0.4  # of the Gaussian that is sampled


def gaussian_denoiser(config: ObjectiveConfig, spread=lambda t: t):
  """The best possible network for x0 ~ N(MEAN, STD^2): the posterior mean, as `config.prediction`."""

  def denoise(z, t):
    c = paths.coefficients(config.path, spread(t))
    variance = c.alpha**2 * STD**2 + c.sigma**2
    x0 = MEAN + c.alpha * STD**2 / variance * (z - c.alpha * MEAN)
    # Written out, for the division by sigma of (z - alpha x0) / sigma is 0 / 0 at t = 0.
    eps = c.sigma / variance * (z - c.alpha * MEAN)
    return paths.target(config.prediction, c, x0, eps)

  return denoise


def grids(config, num_steps):
  return samplers.time_grid(config, num_steps, jnp.ones((1, 1)))


def run(config, method, num_steps, noise):
  spread = lambda t: jnp.broadcast_to(t[..., None], (1, noise.shape[1], 1))  # noqa: E731
  return samplers.sample(
    config, gaussian_denoiser(config, spread), noise, grids(config, num_steps), spread, method=method
  )


@pytest.mark.parametrize(
  "path,prediction,method", list(itertools.product(paths.PATHS, paths.PREDICTIONS, samplers.SAMPLERS))
)
def test_exact_denoiser_reproduces_the_closed_form(path, prediction, method):
  """The flow of a Gaussian maps noise e at t = 1 to MEAN + STD e (both paths have alpha = 0 there)."""
  # `eps` tolerates more: at t = 1, where alpha = 0, it says nothing of x0, so the first step is taken blind.
  config = ObjectiveConfig(path=path, prediction=prediction, floor=1e-4)
  noise = jax.random.normal(jax.random.key(0), (1, 64, 1))
  out = jax.jit(run, static_argnums=(0, 1, 2))(config, method, 400, noise)
  atol = 0.03 if prediction == "eps" else 2e-4 if method == "heun" else 4e-3
  np.testing.assert_allclose(out, MEAN + STD * noise, atol=atol)


@pytest.mark.parametrize("path", paths.PATHS)
def test_order_of_convergence(path):
  config = ObjectiveConfig(path=path, prediction="x0")
  noise = jax.random.normal(jax.random.key(1), (1, 32, 1))

  def error(method, steps):
    out = jax.jit(run, static_argnums=(0, 1, 2))(config, method, steps, noise)
    return float(jnp.abs(out - (MEAN + STD * noise)).max())

  assert 1.6 < error("euler", 20) / error("euler", 40) < 2.5
  assert error("heun", 20) < 0.5 * error("euler", 20)


@pytest.mark.parametrize("path", paths.PATHS)
@pytest.mark.parametrize("prediction", paths.PREDICTIONS)
def test_conversions_round_trip(path, prediction):
  t = jnp.linspace(0.05, 0.95, 7)[:, None]
  x0, eps = jax.random.normal(jax.random.key(2), (2, 7, 5))
  c = paths.coefficients(path, t)
  z = c.alpha * x0 + c.sigma * eps
  got_x0, got_eps = paths.to_x0_eps(prediction, c, z, paths.target(prediction, c, x0, eps), floor=0.0)
  np.testing.assert_allclose(got_x0, x0, atol=2e-5)
  np.testing.assert_allclose(got_eps, eps, atol=2e-5)


@pytest.mark.parametrize("path", paths.PATHS)
def test_velocity_is_the_derivative_of_the_path(path):
  x0, eps = 0.3, -1.2

  def z(t):
    c = paths.coefficients(path, t)
    return c.alpha * x0 + c.sigma * eps

  for t in (0.1, 0.5, 0.9):
    slope = paths.target("velocity", paths.coefficients(path, jnp.float32(t)), x0, eps)
    np.testing.assert_allclose(jax.grad(z)(t), slope, rtol=1e-5)


@pytest.mark.parametrize("space", paths.PREDICTIONS)
@pytest.mark.parametrize("prediction", paths.PREDICTIONS)
def test_loss_in_a_space_is_the_error_measured_there(prediction, space):
  config = ObjectiveConfig(path="cosine", prediction=prediction, loss_space=space, floor=1e-3)
  t = jnp.full((1, 1, 1), 0.4)
  x0, eps, error = jax.random.normal(jax.random.key(3), (3, 1, 1, 6))
  c = paths.coefficients("cosine", t)
  z = objectives.add_noise(config, x0, eps, t)
  output = paths.target(prediction, c, x0, eps) + 0.1 * error
  wrong_x0, wrong_eps = paths.to_x0_eps(prediction, c, z, output, config.floor)
  wanted = paths.target(space, c, wrong_x0, wrong_eps) - paths.target(space, c, x0, eps)
  loss = objectives.token_loss(config, output, x0, eps, t)
  np.testing.assert_allclose(loss, jnp.mean(wanted**2, axis=-1), rtol=1e-4)


def test_shift_keeps_the_ends_and_is_that_of_training():
  config = ObjectiveConfig(shift_base_tokens=64, shift=1.5)
  tokens = jnp.array([[64, 256]])
  np.testing.assert_allclose(objectives.shift_factor(config, tokens), [[1.5, 3.0]])
  grid = samplers.time_grid(config, 10, tokens)
  np.testing.assert_array_equal(grid[0], 1.0)
  np.testing.assert_array_equal(grid[-1], 0.0)
  assert (np.diff(grid, axis=0) < 0).all()
  np.testing.assert_allclose(grid[5, 0], [1.5 / 2.5, 3 / 4], rtol=1e-6)  # t = 1/2
  # Logit-normal times shifted by f have the logit mean log f.
  t = jax.vmap(lambda k: objectives.sample_time(config, k, 256))(jax.random.split(jax.random.key(0), 4000))
  np.testing.assert_allclose(jnp.mean(jnp.log(t / (1 - t))), np.log(3.0), atol=0.06)


def test_guidance():
  conditional, unconditional = jnp.array([2.0]), jnp.array([1.0])
  assert samplers.guide(conditional, unconditional, 1.0) == 2.0
  assert samplers.guide(conditional, unconditional, 0.0) == 1.0
  assert samplers.guide(conditional, unconditional, 3.0) == 4.0


@pytest.mark.parametrize("method", samplers.SAMPLERS)
def test_given_tokens_are_held(method):
  config = ObjectiveConfig(prediction="x0")
  noise = jax.random.normal(jax.random.key(4), (1, 6, 2))
  given = jnp.arange(6)[None, :, None] < 2
  seen = []

  def denoiser(z, t):
    jax.debug.callback(lambda z: seen.append(np.asarray(z[:, :2])), z)
    return 0.5 * z

  clean = jnp.full((1, 6, 2), 0.123)
  out = samplers.sample(
    config, denoiser, noise, grids(config, 3), lambda t: jnp.broadcast_to(t[..., None], (1, 6, 1)),
    method=method, given_BL1=given, clean_BLC=clean,
  )  # fmt: skip
  jax.effects_barrier()
  np.testing.assert_array_equal(out[:, :2], clean[:, :2])
  assert seen and all((z == np.float32(0.123)).all() for z in seen)


def test_unknown_names_say_what_there_is():
  with pytest.raises(ValueError, match="diffusion.path='linear' is not one of rectified_flow, cosine"):
    ObjectiveConfig(path="linear")
  with pytest.raises(ValueError, match="euler, heun, ddim"):
    config = ObjectiveConfig()
    samplers.sample(config, None, jnp.zeros((1, 1, 1)), grids(config, 1), lambda t: t, method="magic")
