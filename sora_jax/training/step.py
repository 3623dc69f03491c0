"""The jitted training and evaluation steps."""

from collections.abc import Callable

import jax
import jax.numpy as jnp
import optax
from jax.sharding import NamedSharding

from sora_jax.parallel import mesh as mesh_lib
from sora_jax.training import guards
from sora_jax.training import optimizer as optimizer_lib
from sora_jax.training import scalars as scalars_lib
from sora_jax.training.state import Setup
from sora_jax.types import Array, PyTree, Sums, TokenBatch


def make_train_step(
  setup: Setup, *, batch: TokenBatch, accumulate: int = 1, spike_zscore: float = 0.0, spike_window: int = 200
) -> Callable:
  """step(state, batch) -> (state, scalars.Packed); the state is donated, `batch` gives the shapes alone.

  The gradient is that of (sum of losses) / (count), both over all rows, however they are split into
  `accumulate` micro-batches. Where the loss or the gradient norm is not finite, or the loss is a spike
  (training/guards.py), only the counters of steps and of skipped updates change.
  """
  rows = batch.segment_BL.shape[0]
  if accumulate < 1 or rows % accumulate:
    raise ValueError(f"data.rows = {rows} does not split into train.accumulate = {accumulate} micro-batches")
  split = jax.eval_shape(lambda b: _split_rows(b, accumulate), batch)
  micro_shardings = mesh_lib.batch_sharding(setup.mesh, split, leading=1)
  whole = mesh_lib.replicated(setup.mesh)

  def loss(params: PyTree, rest: PyTree, micro: TokenBatch, key: Array) -> tuple[Array, Sums]:
    return setup.task.loss_fn(setup.model(params, rest), micro, key)

  def gradients(params: PyTree, rest: PyTree, batch: TokenBatch, key: Array) -> tuple[PyTree, Sums]:
    grad_fn = jax.grad(loss, has_aux=True)
    if accumulate == 1:
      return _constrain(grad_fn(params, rest, batch, key), setup.shardings["params"])
    split = jax.lax.with_sharding_constraint(_split_rows(batch, accumulate), micro_shardings)

    def body(carry, micro):
      new = _constrain(grad_fn(params, rest, micro, key), setup.shardings["params"])
      return jax.tree.map(jnp.add, carry, new), None

    one = jax.eval_shape(lambda m: grad_fn(params, rest, m, key), jax.tree.map(lambda x: x[0], split))
    zeros = _constrain(jax.tree.map(lambda x: jnp.zeros(x.shape, x.dtype), one), setup.shardings["params"])
    return jax.lax.scan(body, zeros, split)[0]

  def step(state: PyTree, batch: TokenBatch) -> tuple[PyTree, scalars_lib.Packed]:
    params, counters = state["params"], state["counters"]
    key = jax.random.fold_in(jax.random.key(setup.seed), counters["step"])
    grads, sums = gradients(params, state["rest"], batch, key)
    count = jnp.maximum(sums["loss"][1], 1).astype(jnp.float32)
    grads = jax.tree.map(lambda g: g / count, grads)
    norm = optax.tree.norm(grads)
    finite = jnp.isfinite(sums["loss"][0]) & jnp.isfinite(norm)
    spike, new_spike = guards.spike_update(
      state["spike"], sums["loss"][0] / count, zscore=spike_zscore, window=spike_window
    )
    good = finite & ~spike
    updates, opt = setup.tx.update(grads, state["opt"], params)
    new_params = optax.apply_updates(params, updates)
    new = {
      "params": new_params,
      "ema": optimizer_lib.ema_update(setup.optimizer, state["ema"], new_params, counters["updates"]),
      "opt": opt,
      "spike": new_spike,
    }
    new = jax.tree.map(lambda n, o: jnp.where(good, n, o), new, {k: state[k] for k in new})
    new["rest"] = state["rest"]
    new["counters"] = {
      "step": counters["step"] + 1,
      "updates": counters["updates"] + good,
      "skipped": counters["skipped"] + ~good,
      "streak": jnp.where(good, 0, counters["streak"] + 1),
    }
    scalars = {
      "sums": sums,
      "grad_norm": norm,
      "lr": setup.schedule(counters["updates"]),
      "skipped": new["counters"]["skipped"],
      "streak": new["counters"]["streak"],
    }
    return new, scalars_lib.pack(scalars)

  return jax.jit(
    step,
    donate_argnums=0,
    in_shardings=(setup.shardings, mesh_lib.batch_sharding(setup.mesh, batch)),
    out_shardings=(setup.shardings, whole),
  )


def make_eval_step(setup: Setup, *, batch: TokenBatch) -> Callable:
  """step(params, rest, batch) -> Sums."""

  def step(params: PyTree, rest: PyTree, batch: TokenBatch) -> Sums:
    return setup.task.eval_fn(setup.model(params, rest), batch)

  return jax.jit(
    step,
    in_shardings=(
      setup.shardings["params"],
      setup.shardings["rest"],
      mesh_lib.batch_sharding(setup.mesh, batch),
    ),
    out_shardings=mesh_lib.replicated(setup.mesh),
  )


def _split_rows(batch: TokenBatch, parts: int) -> TokenBatch:
  """(B, ...) -> (parts, B / parts, ...), every part taking rows of every device."""
  return jax.tree.map(lambda x: x.reshape(x.shape[0] // parts, parts, *x.shape[1:]).swapaxes(0, 1), batch)


def _constrain(grads_and_sums: tuple[PyTree, Sums], shardings: PyTree) -> tuple[PyTree, Sums]:
  """Gradients laid out as the parameters are, so that they are reduced and scattered, not reduced to all."""
  grads, sums = grads_and_sums
  assert all(isinstance(s, NamedSharding) for s in jax.tree.leaves(shardings))
  return jax.lax.with_sharding_constraint(grads, shardings), sums
