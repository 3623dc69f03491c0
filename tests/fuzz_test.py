"""Damaged and hostile data sets: no crash, no hang, nothing outside the folder opened, nothing unpickled."""

import contextlib
import json
import os
import random
import shutil
import signal
import sys
import tarfile
import threading
from pathlib import Path

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import pytest

from data_pipelines.sources.base import UnreadableError
from sora_jax.packing.geometry import ClipSpec
from tests.datasets import TEXTS, build, clip_bytes, write_csv, write_json

LIMIT_S = 120  # of one case, on a busy machine
FAST, SLOW = 200, 2000
OUTSIDE = "outside_secret"
NASTY = (
  *(
    "../" + OUTSIDE,
    "a/../../" + OUTSIDE,
    "/etc/passwd",
    "link.mp4",
    "a.mp4\0.txt",
    "..",
    ".",
    "/",
    "~/a.mp4",
  ),
  *(
    "\ud83c",
    "file:///etc/passwd",
    "http://localhost/a.mp4",
    "concat:a.mp4|/etc/passwd",
    "a.m3u8",
    "%2e%2e/b",
  ),
  *("-1", "1e999", "NaN", "[" * 2000, "999999999999999999999", "a.mp4,b.mp4", "\u202egpj.a", "CON", "a.mp4 "),
  *("\\..\\b", "x" * 5000, "memory://a.mp4"),
)

_watched: list[str] | None = None


def _audit(event: str, arguments: tuple) -> None:
  if _watched is None:
    return
  if event == "open" and isinstance(arguments[0], (str, bytes)):
    _watched.append(os.fsdecode(arguments[0]))
  if event.startswith("pickle."):
    _watched.append("PICKLE")


sys.addaudithook(_audit)


@contextlib.contextmanager
def watched(root: Path):
  """Fails where a file of the outside is opened, or anything unpickled."""
  global _watched
  _watched = opened = []
  try:
    yield
  finally:
    _watched = None
  assert "PICKLE" not in opened
  real = os.path.realpath(root)
  index = os.path.join(os.path.dirname(real), "index")
  system = (index, sys.prefix, sys.base_prefix, os.path.dirname(os.__file__), "/proc", "/sys", "/dev", "/usr")
  for path in map(os.path.realpath, opened):
    is_code = path.endswith((".py", ".pyc", ".so"))
    is_package = os.path.dirname(path).endswith((".egg-info", ".dist-info"))  # asked which sources it has
    assert is_code or is_package or path.startswith((real, *map(os.path.realpath, system))), path


@contextlib.contextmanager
def limited():
  def late(*_):
    raise TimeoutError(f"a case took more than {LIMIT_S} s")

  old = signal.signal(signal.SIGALRM, late)
  signal.alarm(LIMIT_S)
  try:
    yield
  finally:
    signal.alarm(0)
    signal.signal(signal.SIGALRM, old)


@pytest.fixture(scope="module")
def seeds(tmp_path_factory, plain) -> dict[str, bytes]:
  """Sound files, to be damaged: name in the folder -> content."""
  folder = tmp_path_factory.mktemp("seeds")
  records = [{"path": f"{n}.mp4", "text": t, "cut": [0, 4], "fps": 12} for n, t in TEXTS.items()]
  write_csv(folder / "meta.csv", [{"path": r["path"], "text": r["text"]} for r in records])
  write_json(folder / "list.json", records)
  write_json(folder / "list.jsonl", records, lines=True)
  pq.write_table(pa.Table.from_pylist(records), folder / "list.parquet")
  (folder / "data.txt").write_text(".,list.json\n")
  (folder / "set.toml").write_text(
    "[general]\ncaption_extension = '.txt'\n[[datasets]]\nvideo_directory = '.'\n"
    "[[datasets]]\nvideo_jsonl_file = 'list.jsonl'\n"
  )
  (folder / "train_list.txt").write_text("a.mp4 0\nb.mp4 1\n")
  (folder / "videos.txt").write_text("a.mp4\nb.mp4\n")
  with tarfile.open(folder / "set.tar", "w") as tar:
    for name, text in TEXTS.items():
      for file, content in ((f"{name}.mp4", clip_bytes(plain, name)), (f"{name}.txt", text.encode())):
        (folder / "member").write_bytes(content)
        tar.add(folder / "member", arcname=file)
  (folder / "member").unlink()
  files = {f.name: f.read_bytes() for f in folder.iterdir()}
  return {**files, "a.mp4": clip_bytes(plain, "a"), "a.txt": b"a grey box", "a.json": b'{"caption": "a box"}'}


def mutate(rng: random.Random, content: bytes) -> bytes:
  data = bytearray(content)
  for _ in range(rng.choice((1, 1, 2, 5, 20))):
    at = rng.randrange(len(data) + 1)
    kind = rng.randrange(7)
    if kind == 0 and data:
      data[at % len(data)] ^= 1 << rng.randrange(8)
    elif kind == 1:
      del data[at : at + rng.choice((1, 4, 64, len(data)))]
    elif kind == 2:
      data[at:at] = rng.randbytes(rng.choice((1, 4, 64)))
    elif kind == 3:
      data[at:at] = data[: rng.choice((8, 512, 4096))]
    elif kind == 4:
      data[at : at + 8] = rng.choice((b"\xff" * 8, b"\0" * 8, b"\x7f\xff\xff\xff" * 2, b"77777777"))
    else:  # a name in the place of another
      nasty = rng.choice(NASTY).encode("utf-8", "surrogatepass")
      name = rng.choice((b"a.mp4", b"b.mp4", b"list.json", b"path", b"text"))
      found = data.find(name)
      data[found if found >= 0 else at : (found if found >= 0 else at) + len(name)] = nasty
  return bytes(data[: 2**20])


def mutate_json(rng: random.Random, content: bytes) -> bytes:
  """Sound JSON of unsound values."""
  records = json.loads(content)
  values = (*NASTY, None, -1, 2**70, 1e300, True, [], {}, [None], [2, 1], ["a"] * 3, {"a": {"b": []}})
  for _ in range(rng.randrange(1, 4)):
    record = rng.choice(records)
    record[rng.choice(("path", "text", "cut", "crop", "fps", "label"))] = rng.choice(values)
  return json.dumps(records).encode()


def run_case(case: int, root: Path, seeds: dict[str, bytes], plain) -> str:
  """Reads one damaged set as far as it goes; returns what became of it."""
  rng = random.Random(case)
  name = rng.choice(list(seeds))
  root.mkdir()
  (root.parent / OUTSIDE).write_bytes(clip_bytes(plain, "b"))
  for clip in TEXTS:
    (root / f"{clip}.mp4").write_bytes(clip_bytes(plain, clip))
  (root / "link.mp4").symlink_to(root.parent / OUTSIDE)
  also = {"data.txt": "list.json", "videos.txt": "prompts.txt", "set.toml": "list.jsonl"}.get(name)
  if also:
    (root / also).write_bytes(seeds.get(also, b"one\ntwo\n"))
  is_json = name == "list.json" and rng.random() < 0.7
  (root / name).write_bytes((mutate_json if is_json else mutate)(rng, seeds[name]))
  is_folder = name in ("a.mp4", "a.txt", "a.json")
  with watched(root), limited():
    try:
      source = build(
        root if is_folder else root / name,
        captions_optional=True,
        min_size=8,
        threads=1,
        index_dir=str(root.parent / "index"),
      )
    except ValueError as e:
      assert "\n" not in str(e) and len(str(e)) < 2000, str(e)
      return "refused"
    real = os.path.realpath(root)
    for i in range(len(source)):
      entry, info = source.entry(i), source.info(i)
      assert os.path.realpath(entry.path).startswith(real), entry
      spec = ClipSpec(min(info.num_frames, 3), 16, 24, info.fps)
      with contextlib.suppress(UnreadableError):
        clip = source.load(i, spec)
        assert clip.shape == (spec.num_frames, 16, 24, 3) and clip.dtype == np.uint8
  return "read"


def run(cases: range, folder: Path, seeds, plain) -> None:
  results = {"read": 0, "refused": 0}
  threads = threading.active_count()
  for case in cases:
    root = folder / str(case) / "set"
    root.parent.mkdir()
    try:
      results[run_case(case, root, seeds, plain)] += 1
    except BaseException as e:
      e.add_note(f"case {case}")
      raise
    shutil.rmtree(root.parent)
  assert min(results.values()) > len(cases) / 20, results  # both happen, or nothing is tested
  assert threading.active_count() <= threads + 2


@pytest.mark.parametrize("part", range(4))
def test_damaged_sets(tmp_path, seeds, plain, part):
  run(range(part * FAST // 4, (part + 1) * FAST // 4), tmp_path, seeds, plain)


@pytest.mark.slow
def test_many_damaged_sets(tmp_path, seeds, plain):
  run(range(FAST, FAST + SLOW), tmp_path, seeds, plain)


def test_the_watch_sees(tmp_path):
  (tmp_path / "in").mkdir()
  (tmp_path / "out").write_text("x")
  with pytest.raises(AssertionError, match="out"), watched(tmp_path / "in"):
    (tmp_path / "out").read_text()
