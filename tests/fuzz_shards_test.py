"""Damaged shards: refused in one line, or read; never a crash, a hang or a file of the outside."""

import contextlib
import random
import shutil

import pytest

from data_pipelines.pipeline import DataConfig, build_source
from data_pipelines.sources.base import UnreadableError
from sora_jax.packing.geometry import ClipSpec
from tests.fuzz_test import limited, mutate, watched

prepared = pytest.importorskip("tests.prepared")
FAST, SLOW = 60, 500


@pytest.fixture(scope="module")
def sound(tmp_path_factory):
  folder = tmp_path_factory.mktemp("shards")
  prepared.run_inline(prepared.make_set(folder / "clips", 4), folder / "out")
  return folder / "out"


def run_case(case: int, root, sound) -> str:
  rng = random.Random(case)
  shutil.copytree(sound, root, ignore=shutil.ignore_patterns(".prepare", "report.html"))
  files = sorted(p for p in root.rglob("*") if p.is_file())
  file = rng.choice(files)
  if rng.random() < 0.1:  # a link out of the set in its place
    (root.parent / "outside").write_bytes(file.read_bytes())
    file.unlink()
    file.symlink_to(root.parent / "outside")
  else:
    file.write_bytes(mutate(rng, file.read_bytes()))
  with watched(root), limited():
    try:
      source = build_source(
        DataConfig(source=str(root), captions_optional=True, index_dir=str(root.parent / "index"))
      )
    except ValueError as e:
      assert "\n" not in str(e), str(e)
      return "refused"
    read = 0
    for i in range(len(source)):
      info = source.info(i)
      with contextlib.suppress(UnreadableError):
        clip = source.load(i, ClipSpec(min(info.num_frames, 3), info.height, info.width, info.fps))
        read += clip.shape[0] > 0
  return "read" if read else "unreadable"


def run(cases: range, folder, sound) -> None:
  results = {"read": 0, "refused": 0, "unreadable": 0}
  for case in cases:
    root = folder / str(case) / "set"
    root.parent.mkdir()
    try:
      results[run_case(case, root, sound)] += 1
    except BaseException as e:
      e.add_note(f"case {case}")
      raise
    shutil.rmtree(root.parent)
  assert results["read"] and results["refused"], results


def test_damaged_shards(tmp_path, sound):
  run(range(FAST), tmp_path, sound)


@pytest.mark.slow
def test_many_damaged_shards(tmp_path, sound):
  run(range(FAST, FAST + SLOW), tmp_path, sound)
