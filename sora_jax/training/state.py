"""The state of a run: a pure dict of arrays, laid out on the mesh."""

import dataclasses
from typing import Any

import jax
import jax.numpy as jnp
import optax
from flax import nnx
from jax.sharding import Mesh

from sora_jax.parallel import mesh as mesh_lib
from sora_jax.parallel.rules import Rules
from sora_jax.training import guards
from sora_jax.training import optimizer as optimizer_lib
from sora_jax.training.optimizer import OptimizerConfig
from sora_jax.types import PyTree, Task

# Steps; updates made; updates left out, and how many of these in a row up to now.
COUNTERS = ("step", "updates", "skipped", "streak")


@dataclasses.dataclass(frozen=True, kw_only=True)
class Setup:
  """All that is known of a run's state before an array exists.

  The state is {"params", "ema", "opt", "rest", "spike", "counters": COUNTERS}; "rest" holds the variables
  that are not trained (frozen encoders), "spike" the running loss (training/guards.py).
  `setup.model(state["ema"], state["rest"])` is the network.
  """

  graphdef: Any
  abstract: PyTree  # of ShapeDtypeStructs that carry their shardings
  shardings: PyTree
  tx: optax.GradientTransformation
  schedule: optax.Schedule
  optimizer: OptimizerConfig
  mesh: Mesh
  num_params: int
  task: Task
  seed: int

  def model(self, params: PyTree, rest: PyTree) -> nnx.Module:
    return nnx.merge(self.graphdef, params, rest)


def make_setup(
  task: Task, *, optimizer: OptimizerConfig, num_steps: int, mesh: Mesh, seed: int, rules: Rules | None = None
) -> Setup:
  rules = rules or Rules()
  graphdef, params, rest = nnx.split(nnx.eval_shape(lambda: task.init(nnx.Rngs(seed))), task.trainable, ...)
  tx, schedule = optimizer_lib.make_optimizer(optimizer, num_steps=num_steps, abstract=params)
  whole = mesh_lib.replicated(mesh)
  param_shardings = rules.shardings(params, mesh)
  pure = nnx.to_pure_dict(params)
  opt = jax.eval_shape(tx.init, pure)
  shardings = {
    "params": param_shardings,
    "ema": param_shardings,
    "opt": optax.tree_map_params(
      tx, lambda _, s: s, opt, param_shardings, transform_non_params=lambda _: whole
    ),
    "rest": rules.shardings(rest, mesh),
    "spike": {name: whole for name in guards.spike_state()},
    "counters": {name: whole for name in COUNTERS},
  }
  shapes = jax.eval_shape(lambda: _init(task, tx, seed))
  abstract = jax.tree.map(lambda x, s: jax.ShapeDtypeStruct(x.shape, x.dtype, sharding=s), shapes, shardings)
  for x in jax.tree.leaves(shapes["rest"]):
    assert not jnp.issubdtype(x.dtype, jax.dtypes.prng_key), "a model must not keep random state; pass keys"
  return Setup(
    graphdef=graphdef, abstract=abstract, shardings=shardings, tx=tx, schedule=schedule, optimizer=optimizer,
    mesh=mesh, num_params=sum(x.size for x in jax.tree.leaves(pure)), task=task, seed=seed,
  )  # fmt: skip


def init_state(setup: Setup) -> PyTree:
  """Initial values, each device making its own shards alone."""
  with jax.transfer_guard("allow"):
    return jax.jit(lambda: _init(setup.task, setup.tx, setup.seed), out_shardings=setup.shardings)()


def _init(task: Task, tx: optax.GradientTransformation, seed: int) -> PyTree:
  _, params, rest = nnx.split(task.init(nnx.Rngs(seed)), task.trainable, ...)
  params = nnx.to_pure_dict(params)
  return {
    "params": params,
    "ema": jax.tree.map(jnp.copy, params),
    "opt": tx.init(params),
    "rest": nnx.to_pure_dict(rest),
    "spike": guards.spike_state(),
    "counters": {name: jnp.zeros((), jnp.int32) for name in COUNTERS},
  }
