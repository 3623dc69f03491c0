"""How every main starts and ends: a user's mistake is one line and an exit code, never a traceback.

Exit codes: see parallel/exits.py and docs/faults.md. With several processes a fault of one ends all of them
with its code, in bounded time.
"""

import os
import re
import sys
import time
import traceback
from collections.abc import Callable, Sequence
from pathlib import Path

import jax
from absl import app, flags, logging

from data_pipelines.parts import OutageError, UnreadableError
from sora_jax.parallel import cluster, exits, hostlog, sentinel
from sora_jax.training.checkpoint import SaveError
from sora_jax.training.loop import DivergedError

_DEBUG = flags.DEFINE_bool("debug", False, "Show the traceback of an error.")

# How the runtime says that another process is gone.
_PEER = re.compile(r"Gloo|NCCL|UNAVAILABLE|DEADLINE_EXCEEDED|[Cc]onnection|[Pp]eer|heartbeat|[Cc]oordination")
_MISTAKES = (ValueError, OSError, UnreadableError, flags.Error)
_ROOT = Path(__file__).resolve().parent.parent
_OURS = tuple(_ROOT / name for name in ("sora_jax", "data_pipelines", "configs"))


def run(main: Callable[[list[str]], int | None]) -> None:
  """Parses the flags and exits with what `main` returns (None = 0)."""
  app.run(lambda argv: _guarded(main, argv), flags_parser=_parse)


def _parse(argv: Sequence[str]) -> list[str]:
  debug = "--debug" in argv or "--debug=true" in argv
  try:
    rest = flags.FLAGS(list(argv))
  except SystemExit:  # only --help and its like end a program here, by absl with 1
    sys.exit(exits.DONE)
  except Exception as error:  # config files run while flags are parsed: anything may come
    if debug and not isinstance(error, flags.Error):
      raise
    _fail(_of_config(error, argv), exits.USER_ERROR)
  if len(rest) > 1:
    _fail(ValueError(f"unexpected argument {rest[1]!r}: every option is --name=value"), exits.USER_ERROR)
  return rest


def _of_config(error: Exception, argv: Sequence[str]) -> Exception:
  """What ml_collections says of a config flag, in the user's terms."""
  text = str(error)
  if isinstance(error, AttributeError | KeyError):
    # "'key'" on one line; a suggestion may follow on the next.
    last = re.findall(r"\w+", text.splitlines()[0] if "\n" in text else text.split("\\n")[0])[-1:]
    suggestion = re.search(r"Did you mean [\"'](\w+)", text)
    keys = [arg[2:].split("=")[0] for arg in argv if arg.startswith("--config.")]
    wrong = [key for key in keys if last and last[0] in key.split(".")]
    hint = f"; did you mean {suggestion[1]}?" if suggestion else ""
    return flags.Error(f"the config has no key {wrong[0]}{hint}") if wrong else error
  if "Traceback" in text:  # the config file itself failed: its own words come last
    return flags.Error(text.strip().splitlines()[-1].removeprefix("ValueError: "))
  if "No such file" in text and "config" in text:
    named = next((arg.split("=", 1)[1] for arg in argv if arg.startswith("--config=")), "")
    return flags.Error(f"--config={named}: no such file")
  return error


def _guarded(main: Callable[[list[str]], int | None], argv: list[str]) -> int:
  if not flags.FLAGS["verbosity"].present:
    logging.set_verbosity(logging.WARNING)
    # Orbax warns of its own defaults; what befalls a checkpoint, training/checkpoint.py tells.
    logging.get_absl_handler().addFilter(lambda record: "orbax" not in record.pathname)
  try:
    return _leave(main(argv) or exits.DONE)
  except KeyboardInterrupt:
    _fail(InterruptedError("interrupted"), 130)
  except DivergedError as error:
    _fail(error, exits.DIVERGED)
  except SaveError as error:
    _fail(error, exits.FAULT)
  except exits.PeerLostError as error:
    _fail(error, exits.PEER_LOST)
  except OutageError as error:
    _fail(error, exits.HANG)
  except _MISTAKES as error:
    if _DEBUG.value and cluster.client() is None:
      raise
    # A config that could not be loaded is reported when it is first used.
    _fail(
      _of_config(error, sys.argv) if "Configuration is not available" in str(error) else error,
      exits.USER_ERROR,
    )
  except Exception as error:
    if cluster.client() is None:
      raise
    _fail_among_others(error)


def _leave(code: int) -> int:
  """The end of a run that went as it should: all processes have come so far, or will."""
  if cluster.client() is not None:
    hostlog.event("exit", code=code)
    cluster.leave()
    hostlog.flush()
    os._exit(code)  # threads that load data may be waiting for ever
  return code


def _fail_among_others(error: Exception) -> None:
  """A fault in one of several processes. One that only tells of another's end waits for that one's reason."""
  traceback.print_exc(file=sys.stderr)
  traceback.print_exc(file=hostlog.file())
  if isinstance(error, jax.errors.JaxRuntimeError) and _PEER.search(str(error)):
    time.sleep(3 * sentinel.LINGER_S)  # the sentinel may end this process meanwhile, with the other's code
    _fail(exits.PeerLostError(f"lost another process: {str(error).splitlines()[0][:200]}"), exits.PEER_LOST)
  _fail(error, exits.FAULT)


def _fail(error: Exception, code: int) -> None:
  text = message(error)
  hostlog.say(f"error: {text}", everywhere=True)
  if code != exits.PEER_LOST:
    sentinel.tell_peers(code, text)
  # Not sys.exit: threads that load data, and the barrier at exit, may be waiting for ever.
  sys.stdout.flush()
  sentinel.end_now(code)


def message(error: Exception) -> str:
  """One line; where the error comes from a library, how to see where."""
  if isinstance(error, OSError) and error.strerror:
    text = f"{error.filename}: {error.strerror}" if error.filename else error.strerror
  else:
    text = " ".join(str(error).split()) or type(error).__name__
  frames = traceback.extract_tb(error.__traceback__)
  is_ours = not frames or any(Path(frames[-1].filename).resolve().is_relative_to(folder) for folder in _OURS)
  if is_ours or isinstance(error, OSError | flags.Error | UnreadableError):
    return text
  return f"{type(error).__name__}: {text} (--debug shows where)"
