"""Mains in processes that are forked with the libraries imported, which are most of what a short one costs.

For tests of what a main does with its arguments. That `python -m` itself works, tests of a real process say.
"""

import atexit
import functools
import json
import os
import subprocess
import sys
from collections.abc import Sequence
from pathlib import Path

ROOT = Path(__file__).resolve().parent.parent
TIMEOUT_S = 600
# Read when jax or numpy is imported.
FIXED = {"JAX_PLATFORMS": "cpu", "OPENBLAS_NUM_THREADS": "1"}


@functools.cache
def _server() -> subprocess.Popen:
  """Of this process of pytest; it ends with it."""
  env = {name: value for name, value in os.environ.items() if name != "XLA_FLAGS"} | FIXED
  command = [sys.executable, "-m", "tests.fork_server"]
  server = subprocess.Popen(
    command, stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True, cwd=ROOT, env=env
  )
  atexit.register(server.communicate)
  return server


def run(lines: Sequence[Sequence], env: dict[str, str]) -> list[subprocess.CompletedProcess]:
  """What `python -m` would give in that environment, for each line (module, argument...)."""
  lines, server = [[str(word) for word in line] for line in lines], _server()
  request = {"lines": lines, "env": env | FIXED, "timeout_s": TIMEOUT_S}
  print(json.dumps(request), file=server.stdin, flush=True)
  reply = server.stdout.readline()
  assert reply, f"the fork server ended with code {server.wait()}"
  return [
    subprocess.CompletedProcess(line, code, out, err)
    for line, (code, out, err) in zip(lines, json.loads(reply))
  ]
