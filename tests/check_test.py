"""Sources of one's own, and the checker of sources."""

import dataclasses
import sys

import numpy as np
import pytest

from data_pipelines import check
from data_pipelines.sources.base import SampleInfo, Sizes
from data_pipelines.sources.synthetic import SyntheticSource
from sora_jax.packing.geometry import ClipSpec
from tests.datasets import TEXTS, build

MODULE = """
import numpy as np
from data_pipelines.sources.synthetic import SyntheticSource

def drawn(num_samples=3):
  return SyntheticSource(num_samples)

def files(folder):
  return [{"path": f"{folder}/{n}.mp4", "caption": t} for n, t in (("a", "one"), ("b", ["two", "three"]))]

class Arrays:
  def __len__(self):
    return 2
  def __getitem__(self, i):
    video = np.full((1 + 3 * i, 32, 48, 3), 40 * np.arange(1 + 3 * i)[:, None, None, None], np.uint8)
    return {"video": video, "caption": f"number {i}", "fps": 8.0}

def broken():
  raise RuntimeError("no such bucket")

number = lambda: 7
"""


@pytest.fixture
def module(tmp_path, monkeypatch):
  (tmp_path / "own_sources.py").write_text(MODULE)
  monkeypatch.syspath_prepend(tmp_path)
  yield "own_sources"
  sys.modules.pop("own_sources", None)


def test_sources_by_module_and_name(module, plain):
  assert build(f"{module}:drawn", source_kwargs={"num_samples": 5}).info(4).id == 4
  source = build(f"{module}:files", source_kwargs={"folder": plain.root}, data_root=plain.root)
  assert [source.info(i).captions for i in range(2)] == [("one",), ("two", "three")]
  spec = ClipSpec(4, 48, 64, 12.0)
  assert np.array_equal(source.load(1, spec), plain.load(1, spec))
  source = build(f"{module}:Arrays")
  assert [source.info(i).num_frames for i in range(2)] == [1, 4] and source.info(0).fps == 0
  assert source.load(1, ClipSpec(2, 16, 24, 4.0), 1 / 8)[:, 0, 0, 0].tolist() == [40, 120]
  for name, message in {
    "no_such_module:X": "cannot import no_such_module",
    f"{module}:Gone": "own_sources has no Gone",
    f"{module}:files": "missing 1 required positional argument",
    f"{module}:number": "is no source: it has no __len__, info, load, fingerprint",
  }.items():
    with pytest.raises(ValueError, match=message):
      build(name)


def run(capsys, *arguments):
  code = check.main([str(a) for a in arguments])
  return code, capsys.readouterr().out


def test_the_checker_on_paths_and_modules(module, plain, tmp_path, capsys):
  code, out = run(capsys, plain.root)
  assert code == 0 and out.startswith("fine: ") and "2 samples, 2 read" in out
  assert run(capsys, f"{module}:Arrays")[0] == 0
  assert run(capsys, "synthetic", "--num_samples=9")[0] == 0
  assert run(capsys, f"{module}:drawn", '--source_kwargs={"num_samples": 4}')[1].count("4 samples") == 1
  code, out = run(capsys, f"{module}:broken")
  assert code == 1 and "raises RuntimeError: no such bucket" in out
  code, out = run(capsys, tmp_path / "gone")
  assert code == 1 and out.startswith("wrong: data.source=") and out.count("\n") == 1
  for name in TEXTS:
    (tmp_path / f"{name}.mp4").write_bytes(open(f"{plain.root}/{name}.mp4", "rb").read())  # noqa: SIM115
  (tmp_path / "a.txt").write_text("x")
  (tmp_path / "c.mp4").write_bytes(b"")
  code, out = run(capsys, tmp_path)
  assert code == 1 and "wrong: c.mp4 is left out: empty" in out
  assert "wrong: 1 of 2 samples have no caption: b.mp4" in out


class Faulty:
  """A good source, one part of which is replaced."""

  def __init__(self, **parts):
    self.base, self.name, self.rejects = SyntheticSource(3), "faulty", []
    self.__dict__.update(parts)

  def __len__(self):
    return 3

  def info(self, i):
    return dataclasses.replace(self.base.info(i), **self.__dict__.get("changes", {}))

  def load(self, i, spec, start_s=0.0):
    return self.base.load(i, spec, start_s)

  def fingerprint(self):
    return self.base.fingerprint()


def raises(error):
  def load(i, spec, start_s=0.0):
    raise error

  return load


@pytest.mark.parametrize(
  "parts, line",
  [
    ({"rejects": ["a"]}, "rejects is no list"),
    ({"changes": {"id": 5}}, "info(0): id is 5, not 0"),
    ({"changes": {"captions": "text"}}, "captions is 'text', no tuple of texts"),
    ({"changes": {"captions": ()}}, "3 of 3 samples have no caption"),
    ({"changes": {"name": "same"}}, "3 samples are named 'same'"),
    ({"changes": {"height": 0}}, "height is 0, no whole number"),
    ({"changes": {"fps": float("nan")}}, "fps is nan, no rate"),
    ({"changes": {"num_frames": 2, "fps": 0.0}}, "fps is 0 with 2 frames"),
    ({"changes": {"label": "cat"}}, "label is 'cat', no whole number"),
    ({"info": lambda i: {"id": i}}, "info(0): is a dict, no SampleInfo"),
    ({"load": raises(KeyError("x"))}, "load raises KeyError"),
    ({"load": raises(check.UnreadableError("empty"))}, "cannot be read at 0.00 s: empty"),
    ({"load": lambda i, s, t=0.0: np.zeros((1, 2, 2, 3))}, "load gives float64(1, 2, 2, 3) for uint8("),
    ({"load": lambda i, s, t=0.0: np.random.bytes(1)}, "load gives bytes for uint8("),
    ({"sizes": lambda: Sizes(*np.ones((4, 2)))}, "sizes().num_frames has shape (2,), not (3,)"),
    ({"sizes": lambda: Sizes(*np.ones((4, 3)))}, "sizes().height[0] is 1.0, that of info(0) is "),
    ({"info": lambda i: {}[i]}, "info(0) raises KeyError: 0"),
    ({"hook": lambda: 0}, "cannot be pickled"),
    ({"fingerprint": lambda: 3}, "fingerprint() gives '3'"),
  ],
)
def test_each_fault_has_its_line(parts, line):
  assert list(check.check_source(Faulty())) == []
  lines = list(check.check_source(Faulty(**parts)))
  assert any(line in found for found in lines), lines


class Latents:
  """Larger than pixels are looked at."""

  name, rejects, encoder_hash, channels = "latents", [], "vae-1", 4

  def __init__(self, made: int = 4, dtype: str = "float16"):
    self.made, self.dtype = made, dtype

  def __len__(self):
    return 3

  def info(self, i):
    return SampleInfo(id=i, name=str(i), num_frames=3, height=200, width=300, fps=8.0, captions=("a box",))

  def load(self, i, spec, start_s=0.0):
    return np.zeros((spec.num_frames, spec.height, spec.width, self.made), self.dtype)

  def fingerprint(self):
    return "latents"


def test_latents_are_checked_as_such():
  assert list(check.check_source(Latents())) == []
  for wrong, line in (({"made": 5}, "load gives float16("), ({"dtype": "uint8"}, "load gives uint8(")):
    lines = list(check.check_source(Latents(**wrong)))
    assert len(lines) == 3 and all(line in found and "for floats(" in found for found in lines), lines
