"""The launch scripts: they parse, refuse nonsense in one line, and their pins are within the ranges."""

import configparser
import os
import re
import shutil
import signal
import subprocess
import sys
from pathlib import Path

import pytest
from packaging.requirements import Requirement
from packaging.version import Version

ROOT = Path(__file__).resolve().parent.parent
SCRIPTS = [*sorted((ROOT / "launch").glob("*.sh")), ROOT / ".ci" / "run"]
PINS = sorted((ROOT / "launch" / "requirements").glob("py*.txt"))


def bash(*args, **env):
  return subprocess.run(
    ["bash", *map(str, args)], capture_output=True, text=True, cwd=ROOT, env=os.environ | env, timeout=60
  )


@pytest.mark.parametrize("script", SCRIPTS, ids=lambda p: p.name)
def test_scripts_parse(script):
  assert bash("-n", script).stderr == ""


@pytest.mark.skipif(not shutil.which("shellcheck"), reason="no shellcheck")
def test_shellcheck():
  command = ["shellcheck", "-x", *map(str, SCRIPTS)]
  checked = subprocess.run(command, capture_output=True, text=True, cwd=ROOT)
  assert checked.returncode == 0, checked.stdout


def test_help_says_what_the_options_are():
  for script, option in (("quickstart.sh", "--data=DIR_OR_METADATA_CSV"), ("test.sh", "--all")):
    shown = bash(ROOT / "launch" / script, "--help")
    assert shown.returncode == 0 and option in shown.stdout


@pytest.mark.parametrize(
  "args,env,says",
  [
    (["--colour=red"], {}, "error: unknown option --colour=red"),
    (["--data"], {}, "error: --data wants a value"),
    (["--data=no/such/folder"], {}, "no/such/folder does not exist"),
    ([], {"SORA_JAX_PYTHON": "no-such-python"}, "SORA_JAX_PYTHON=no-such-python is not a Python"),
  ],
)
def test_quickstart_refuses_in_one_line(args, env, says):
  done = bash(ROOT / "launch" / "quickstart.sh", *args, **env)
  assert done.returncode == 2
  assert says in done.stderr.splitlines()[-1]


def test_a_machine_without_python_is_told_so(tmp_path):
  """A PATH with the shell's tools and no Python."""
  for tool in ("bash", "dirname", "sed", "cmp"):
    (tmp_path / tool).symlink_to(shutil.which(tool))
  done = bash(
    ROOT / "launch" / "test.sh", PATH=str(tmp_path), SORA_JAX_PYTHON="", SORA_JAX_VENV=str(tmp_path / "venv")
  )
  assert done.returncode == 2
  assert "error: no Python of version 3.11 or later found" in done.stderr


def test_a_child_that_ends_while_its_parent_is_told_to():
  """On a busy machine the child has ended before the parent comes to ask for it: its code is not lost."""
  late = 'kill() { builtin kill "$@" && sleep 0.5; }'
  child = "import os, signal as s; s.signal(s.SIGTERM, lambda *_: os._exit(44)); print('ready', flush=True)"
  code = f'source launch/lib_common.sh; {late}; run_child {sys.executable} -c "$1"; echo "$CODE $TOLD"'
  command = ["bash", "-euc", code, "-", f"{child}; s.pause()"]
  parent = subprocess.Popen(command, cwd=ROOT, stdout=subprocess.PIPE, text=True)
  assert parent.stdout.readline() == "ready\n"
  parent.send_signal(signal.SIGTERM)
  assert parent.communicate(timeout=60)[0] == "44 1\n"


@pytest.mark.parametrize("path", PINS, ids=lambda p: p.stem)
def test_pins_are_exact_and_within_the_ranges(path):
  lines = [line for line in path.read_text().splitlines() if not line.startswith("#")]
  assert all(re.fullmatch(r"[\w.-]+==[\w.]+", line) for line in lines)
  pins = {name.lower().replace("_", "-"): Version(v) for name, v in (line.split("==") for line in lines)}
  setup = configparser.ConfigParser()
  setup.read(ROOT / "setup.cfg")
  wanted = setup["options"]["install_requires"] + setup["options.extras_require"]["test"]
  for requirement in map(Requirement, wanted.split("\n")[1:]):
    name = requirement.name.lower().replace("_", "-")
    assert name in pins, f"{name} is not pinned"
    assert pins[name] in requirement.specifier, f"{name}=={pins[name]} is not {requirement.specifier}"
