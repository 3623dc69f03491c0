"""What the stand-ins share: a record of calls, a scenario that a test wrote, and files under a lock."""

import contextlib
import fcntl
import json
import os
import sys
from pathlib import Path

STATE = Path(os.environ.get("STAND_IN_STATE", "."))


@contextlib.contextmanager
def locked():
  with open(STATE / "lock", "w") as lock:
    fcntl.flock(lock, fcntl.LOCK_EX)
    yield


def scenario(key, default=None):
  path = STATE / "scenario.json"
  return json.loads(path.read_text()).get(key, default) if path.is_file() else default


def record(tool: str, argv: list[str], **more) -> None:
  with locked(), open(STATE / "calls.jsonl", "a") as file:
    file.write(json.dumps({"tool": tool, "argv": argv, **more}) + "\n")


def count(name: str) -> int:
  """How often it was called with this name before."""
  with locked():
    path = STATE / "counts" / name
    path.parent.mkdir(exist_ok=True)
    before = int(path.read_text()) if path.is_file() else 0
    path.write_text(str(before + 1))
  return before


def options(argv: list[str]) -> tuple[list[str], dict[str, str]]:
  """Positional arguments and --name=value; a bare --name is "". Values apart from their names are refused."""
  plain = [arg for arg in argv if not arg.startswith("--")]
  pairs = [arg[2:].partition("=") for arg in argv if arg.startswith("--")]
  return plain, {name: value for name, _, value in pairs}


def fail(text: str, code: int = 1):
  print(text, file=sys.stderr)
  sys.exit(code)
