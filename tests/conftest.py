"""Eight fake CPU devices, set before jax is imported."""

import os
from importlib.metadata import version

FLAGS = (
  "--xla_force_host_platform_device_count=8",
  # Programs here are tiny and run a few times: compile fast (7 times faster), run slowly.
  "--xla_backend_optimization_level=0",
)
if version("jaxlib").startswith("0.10."):  # later versions know no such flag, and abort
  FLAGS += ("--xla_cpu_use_fusion_emitters=false",)
os.environ["JAX_PLATFORMS"] = "cpu"
os.environ["XLA_FLAGS"] = " ".join([os.environ.get("XLA_FLAGS", ""), *FLAGS])
os.environ.setdefault("TF_CPP_MIN_LOG_LEVEL", "2")
