"""Runs mains as processes that begin with the libraries imported: python -m tests.fork_server; see forked.py.

A line of JSON in, {"lines": [[module, argument...]...], "env": {...}, "timeout_s"}; a line out, per command
line [exit code, stdout, stderr]. Only libraries are imported, and only those that start no thread: the
product's own modules define flags and read the environment as they are imported, each process anew.
"""

import json
import os
import runpy
import signal
import sys
import tempfile
import time

import absl.app  # noqa: F401
import av  # noqa: F401
import einops  # noqa: F401
import flax.nnx  # noqa: F401
import fsspec  # noqa: F401
import grain  # noqa: F401
import jax.experimental.pallas.tpu  # noqa: F401
import matplotlib.backends.backend_agg  # noqa: F401
import matplotlib.figure  # noqa: F401
import ml_collections.config_flags  # noqa: F401
import optax  # noqa: F401
import orbax.checkpoint  # noqa: F401
import PIL.Image  # noqa: F401
import scipy.optimize  # noqa: F401
import scipy.special  # noqa: F401
import tensorboardX  # noqa: F401
import tokenizers  # noqa: F401

AT_A_TIME = 2


def threads() -> int:
  return len(os.listdir("/proc/self/task")) if os.path.isdir("/proc/self/task") else 1


def fork(line: list[str], env: dict[str, str], out, err) -> int | None:
  """The child's pid; None in the child, which is set up like a process that was started with that line."""
  if pid := os.fork():
    return pid
  os.environ.clear()
  os.environ.update(env)
  with open(os.devnull) as nothing:
    os.dup2(nothing.fileno(), 0)
  os.dup2(out.fileno(), 1)
  os.dup2(err.fileno(), 2)
  sys.argv = line  # runpy puts the file's name in place of the module's
  return None


def collect(running: dict, deadline: float) -> None:
  """Waits for one of {pid: [..., code]} to end, or ends all."""
  while True:
    pid, status = os.waitpid(-1, os.WNOHANG)
    if pid:
      running.pop(pid).append(os.waitstatus_to_exitcode(status))
      return
    if time.monotonic() > deadline:
      for pid in running:
        os.kill(pid, signal.SIGKILL)
      deadline = float("inf")
    time.sleep(0.005)


def serve(requests, replies) -> list[str] | None:
  """In a child: its command line. In the server: None, when there are no more requests."""
  for request in map(json.loads, requests):
    deadline = time.monotonic() + request["timeout_s"]
    done, running = [], {}
    for line in request["lines"]:
      if len(running) == AT_A_TIME:
        collect(running, deadline)
      files = [tempfile.TemporaryFile() for _ in range(2)]  # noqa: SIM115
      if (pid := fork(line, request["env"], *files)) is None:
        return line
      done.append(files)
      running[pid] = files
    while running:
      collect(running, deadline)
    texts = [(code, *(_text(file) for file in files)) for *files, code in done]
    print(json.dumps(texts), file=replies, flush=True)
  return None


def _text(file) -> str:
  with file:
    file.seek(0)
    return file.read().decode()


if __name__ == "__main__":
  assert threads() == 1, "a library starts a thread when it is imported: leave it out, a fork would lose it"
  # Nothing but replies may reach the reader.
  replies = os.fdopen(os.dup(1), "w")
  os.dup2(2, 1)
  if line := serve(sys.stdin, replies):
    runpy.run_module(line[0], run_name="__main__", alter_sys=True)
