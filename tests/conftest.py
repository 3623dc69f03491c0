"""Eight fake CPU devices and a cache of programs, set before jax is imported; two clips for tests of data."""

import atexit
import os
import shutil
import tempfile
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
if "JAX_COMPILATION_CACHE_DIR" not in os.environ:  # workers of xdist and the processes of tests inherit it
  # Programs come back: in runs that go on, in tests of the same step. Of this run of the tests alone.
  CACHE = tempfile.mkdtemp(prefix="sora_jax_tests_")
  atexit.register(shutil.rmtree, CACHE, ignore_errors=True)
  os.environ |= {"JAX_COMPILATION_CACHE_DIR": CACHE, "JAX_PERSISTENT_CACHE_MIN_COMPILE_TIME_SECS": "0.2"}

import pytest  # noqa: E402

from tests.datasets import make_plain, put_clips  # noqa: E402

# The longest files begin first: at the end of a run in two processes neither waits long for the other.
LONGEST_FIRST = (
  "training", "rehearse", "launch_tpu", "attention_tpu", "faults", "cli", "attention", "launch_refusals",
  "scaling_ladder", "training_guards", "pipeline", "scaling", "mixture", "video_io_awkward", "sample",
  "packed_alone", "exactness", "prepare_restart", "launch_gke", "resume", "attention_context", "texts",
)  # fmt: skip


def pytest_configure(config):
  if hasattr(config.option, "loadscopereorder"):  # xdist would begin with the files of most tests
    config.option.loadscopereorder = False


def pytest_collection_modifyitems(items):
  places = {f"{name}_test.py": place for place, name in enumerate(LONGEST_FIRST)}
  items.sort(key=lambda item: places.get(item.path.name, len(places)))


@pytest.fixture(scope="module")
def plain(tmp_path_factory):
  """A source of two captioned clips in a plain folder."""
  return make_plain(tmp_path_factory.mktemp("plain"))


@pytest.fixture
def root(tmp_path, plain):
  """A folder without captions: a.mp4, b.mp4."""
  put_clips(tmp_path, plain)
  return tmp_path
