"""One run of the training loop as a process that can be killed: WORKDIR NUM_STEPS NUM_DEVICES TASK."""

import os
import sys
import time

workdir, num_steps, num_devices, name = sys.argv[1], int(sys.argv[2]), int(sys.argv[3]), sys.argv[4]
# As the tests run (tests/conftest.py), but for the devices.
kept = [flag for flag in os.environ.get("XLA_FLAGS", "").split() if "device_count" not in flag]
os.environ["XLA_FLAGS"] = " ".join([*kept, f"--xla_force_host_platform_device_count={num_devices}"])
os.environ["JAX_PLATFORMS"] = "cpu"

from sora_jax.parallel.mesh import MeshConfig  # noqa: E402
from sora_jax.parallel.rules import Rules  # noqa: E402
from sora_jax.training.loop import TrainConfig, fit  # noqa: E402
from sora_jax.training.optimizer import OptimizerConfig  # noqa: E402
from tests import tiny_dit, toy  # noqa: E402

module = {"toy": toy, "dit": tiny_dit}[name]


def slowly(start):
  for batch in module.batches(start):
    time.sleep(0.05)
    yield batch


result = fit(
  module.task(),
  config=TrainConfig(num_steps=num_steps, log_every=1, save_every=3, keep=2, tensorboard=False),
  optimizer=OptimizerConfig(lr=1e-2, warmup_steps=2),
  mesh=MeshConfig(replica=1, fsdp=num_devices),
  train_batches=slowly,
  workdir=workdir,
  resolved_config={},
  rules=Rules(small=0),
)
sys.exit(42 if result.preempted else 0)
