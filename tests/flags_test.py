"""Flags of the programs: help ends well and explains, switches are read as users write them."""

import subprocess
import sys
from pathlib import Path

import pytest

from data_pipelines import check, report
from data_pipelines.cli import new_parser, parse, remarks
from data_pipelines.config import DataConfig
from data_pipelines.prepare.config import PrepareConfig

ROOT = Path(__file__).resolve().parent.parent


def test_help_ends_well_and_shows_flags():
  """Of programs on absl; three at once, most of the time goes into imports."""
  shown = {
    "sora_jax.train": "--workdir",
    "sora_jax.scaling_laws": "--compute_range",  # defined by a command of it
    "data_pipelines.prepare": "--max_caption_words: of",
  }
  running = {
    name: subprocess.Popen(
      [sys.executable, "-m", name, "--help"],
      stdout=subprocess.PIPE,
      stderr=subprocess.PIPE,
      text=True,
      cwd=ROOT,
    )
    for name in shown
  }
  for name, process in running.items():
    out, err = process.communicate(timeout=120)
    assert process.returncode == 0 and shown[name] in out and not err, (name, err)


def test_wrong_flags_of_prepare_are_one_line():
  command = [sys.executable, "-m", "data_pipelines.prepare", "--colour=3"]
  process = subprocess.run(command, capture_output=True, text=True, cwd=ROOT, timeout=120)
  assert process.returncode == 2 and process.stderr == "error: Unknown command line flag 'colour'\n"


def test_help_of_the_others(capsys):
  for main in (check.main, report.main):
    with pytest.raises(SystemExit) as end:
      main(["--help"])
    out = capsys.readouterr().out
    assert end.value.code == 0 and "decode_limit_s VALUE" in out and "decoded once for the index" in out
  for kind in (DataConfig, PrepareConfig):
    assert [name for name, said in remarks(kind).items() if not said] in ([], ["token_drop"])


def test_switches(capsys):
  def value(*argv):
    parser = new_parser("check", check.__doc__)
    parser.add_argument("source")
    check.add_arguments(parser, without=("source",))
    return parse(parser, [*argv])["captions_optional"]

  for argv in (
    ["--captions_optional", "here"],
    ["here", "--captions_optional"],
    ["--captions_optional=1", "here"],
  ):
    assert value(*argv) is True
  assert value("here", "--captions_optional", "True") is True
  assert value("--nocaptions_optional", "here") is value("here") is False
  with pytest.raises(SystemExit):
    value("here", "--captions_optional=maybe")
  assert "'maybe' is neither true nor false" in capsys.readouterr().err


def test_wrong_maps_name_an_example_of_their_own(capsys):
  for given, says in (
    ('["clips"]', 'such as {"clips": {"source": "clips", "weight": 3}'),
    ('{"a": "clips"}', "data.sources.a='clips' is no map"),
  ):
    try:
      code = report.main([f"--sources={given}"])
    except SystemExit as end:
      code = end.code
    assert code == 2 and says in capsys.readouterr().err
