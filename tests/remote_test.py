"""Sets in an object store read as on disk; sources that packages announce."""

import json
import uuid

import fsspec
import numpy as np
import pytest

from data_pipelines import parts
from data_pipelines.pipeline import DataConfig, build_source
from data_pipelines.sources import remote
from data_pipelines.sources.base import ReadOptions, UnreadableError
from sora_jax.packing.geometry import ClipSpec
from tests.datasets import TEXTS, clip_bytes, put_frames, tar_of, write_json

CLIP = ClipSpec(4, 48, 64, 12.0)


@pytest.fixture
def store(plain):
  """The address of a folder with the two clips in an object store of memory."""
  address = f"memory://{uuid.uuid4().hex}/set"
  put(address, {f"{name}.mp4": clip_bytes(plain, name) for name in TEXTS})
  return address


def put(address, files):
  fs, root = fsspec.url_to_fs(address)
  for name, content in files.items():
    fs.pipe_file(f"{root}/{name}", content)


def build(address, tmp_path, **changes):
  return build_source(DataConfig(source=address, index_dir=str(tmp_path / "index"), **changes))


def assert_same(source, plain):
  assert [source.info(i).captions for i in range(2)] == [(t,) for t in TEXTS.values()]
  for i in range(2):
    got, want = source.info(i), plain.info(i)
    assert (got.num_frames, got.height, got.width, got.fps) == (want.num_frames, 48, 64, want.fps)
    np.testing.assert_array_equal(source.load(i, CLIP, 0.1), plain.load(i, CLIP, 0.1))


def test_a_folder_with_captions_beside(store, plain, tmp_path):
  put(store, {f"{name}.txt": text.encode() for name, text in TEXTS.items()})
  source = build(store, tmp_path)
  assert_same(source, plain)
  assert "://" in source.entry(0).path
  assert_same(build(store, tmp_path), plain)  # from the index


@pytest.mark.parametrize("name", ["metadata.csv", "list.jsonl"])
def test_tables(store, plain, tmp_path, name):
  records = [{"file_name": f"{n}.mp4", "text": t} for n, t in TEXTS.items()]
  lines = [json.dumps(r) for r in records]
  if name.endswith("csv"):
    lines = ["file_name,text", *(f'{r["file_name"]},"{r["text"]}"' for r in records)]
  put(store, {name: "\n".join(lines).encode()})
  assert_same(build(f"{store}/{name}", tmp_path), plain)


@pytest.mark.parametrize("scheme", ["memory", "file"])
def test_tars_are_read_in_place(plain, tmp_path, scheme):
  address = f"memory://{uuid.uuid4().hex}/set" if scheme == "memory" else (tmp_path / "set").as_uri()
  (tmp_path / "set").mkdir()
  clips = {n: clip_bytes(plain, n) for n in TEXTS}
  one = {"long/" * 30 + "a.mp4": clips["a"], "long/" * 30 + "a.txt": TEXTS["a"].encode()}
  two = {"b.json": json.dumps({"caption": TEXTS["b"]}).encode(), "b.mp4": clips["b"]}
  put(address, {"9.tar": tar_of(one.items()), "10.tar": tar_of(two.items())})
  source = build(address, tmp_path)
  assert source.form == "tar" and "://" in source.entry(0).path and source.entry(0).span[1] == len(clips["a"])
  assert_same(source, plain)
  put(address, {"all.tar": tar_of((one | two).items())})
  assert_same(build(f"{address}/all.tar", tmp_path), plain)
  put(address, {"short.tar": tar_of((two | one).items())[: len(clips["b"]) + 4000]})
  source = build(f"{address}/short.tar", tmp_path)
  assert source.info(0).captions == (TEXTS["b"],) and source.rejects[0][1].startswith("truncated: ")
  put(address, {"none.tar": b"\x1f\x8b" + bytes(2000)})
  with pytest.raises(ValueError, match=rf"^{address}/none.tar is compressed"):
    build(f"{address}/none.tar", tmp_path)


@pytest.mark.parametrize("way", ["frames", "list.jsonl"])
def test_folders_of_frames(plain, tmp_path, way):
  address, folder = f"memory://{uuid.uuid4().hex}/set", tmp_path / "set"
  for name, text in TEXTS.items():
    put_frames(folder / "clips" / name, f"{plain.root}/{name}.mp4")
    (folder / "clips" / f"{name}.txt").write_text(text)
  records = [{"video_path": f"clips/{n}", "caption": t} for n, t in TEXTS.items()]
  write_json(folder / "list.jsonl", records, lines=True)
  put(address, {f.relative_to(folder).as_posix(): f.read_bytes() for f in folder.rglob("*") if f.is_file()})
  inside = "clips" if way == "frames" else way
  near = build_source(DataConfig(source=str(folder / inside), frame_rate=12))
  far = build(f"{address}/{inside}", tmp_path, frame_rate=12)
  assert near.form == far.form and "://" in far.entry(0).path and len(near) == len(far) == 2
  for i in range(2):
    assert near.info(i) == far.info(i)
    np.testing.assert_array_equal(far.load(i, CLIP, 0.1), near.load(i, CLIP, 0.1))
  frames = sorted((folder / "clips" / "a").iterdir())
  put(
    f"{address}/clips/a", {frames[1].name: frames[0].read_bytes()}
  )  # of another size: it is seen to have changed
  again = build(f"{address}/{inside}", tmp_path, frame_rate=12)
  assert (again.load(0, ClipSpec(2, 48, 64, 12.0))[0] == again.load(0, ClipSpec(2, 48, 64, 12.0))[1]).all()


def test_a_store_that_fails_at_times_is_asked_again(store, plain, tmp_path, monkeypatch, caplog):
  """Errors of clients are of any class; what is not there is not waited for."""
  put(store, {f"{name}.txt": text.encode() for name, text in TEXTS.items()})
  source = build(store, tmp_path)
  fs, errors, waits = fsspec.filesystem("memory"), [], []
  fetch = type(fs).cat_file

  def failing(self, *args, **kwargs):
    if errors:
      raise errors.pop()
    return fetch(self, *args, **kwargs)

  monkeypatch.setattr(type(fs), "cat_file", failing)
  monkeypatch.setattr(parts.time, "sleep", waits.append)
  errors += [RuntimeError("503 Slow Down"), TimeoutError("timed out"), OSError(5, "I/O")]
  assert_same(source, plain)
  assert len(waits) == 3 and 0 < waits[0] < waits[1] < waits[2] and "503 Slow Down" in caplog.text
  errors += [RuntimeError("503 Slow Down")] * 4
  with pytest.raises(UnreadableError, match=r"unreachable: .*a.mp4: RuntimeError: 503 Slow Down"):
    source.load(0, CLIP)
  assert len(waits) == 6
  errors += [FileNotFoundError("a.mp4")]
  with pytest.raises(UnreadableError, match="unreadable: "):
    source.load(0, CLIP)
  assert len(waits) == 6


def test_what_could_not_be_reached_is_looked_into_again(store, plain, tmp_path, monkeypatch):
  put(store, {f"{name}.txt": text.encode() for name, text in TEXTS.items()})
  read = parts.patiently

  def unreachable(name, read):
    raise UnreadableError(parts.UNREACHABLE, name)

  monkeypatch.setattr(parts, "patiently", unreachable)
  with pytest.raises(ValueError, match="unreachable"):
    build(store, tmp_path)
  monkeypatch.setattr(parts, "patiently", read)
  assert_same(build(store, tmp_path), plain)


def test_of_a_tar_only_headers_and_captions_are_fetched(plain, tmp_path, monkeypatch):
  address, fetched = f"memory://{uuid.uuid4().hex}/set", []
  noise = np.random.default_rng(0).bytes(2**20)
  put(address, {"all.tar": tar_of({"a.mp4": noise, "a.txt": b"x", "b.mp4": noise, "b.txt": b"y"}.items())})
  read = remote._Copied.read

  def counted(self, count):
    data = read(self, count)
    fetched.append(len(data))
    return data

  monkeypatch.setattr(remote._Copied, "read", counted)
  form, found = remote.read(f"{address}/all.tar", ReadOptions())
  assert [e.captions for e in found.entries] == [("x",), ("y",)] and 0 < sum(fetched) < 10_000


def test_what_is_wrong_is_named_by_its_address(store, tmp_path):
  with pytest.raises(ValueError, match=f"none of the 2 media files in {store} has a caption"):
    build(store, tmp_path)
  put(store, {"meta.csv": b"file_name,words\na.mp4,x\n"})
  with pytest.raises(ValueError, match=f"{store}/meta.csv has no caption column .*; it has file_name, words"):
    build(f"{store}/meta.csv", tmp_path)
  with pytest.raises(ValueError, match="memory://gone/x' is not there"):
    build("memory://gone/x", tmp_path)
  with pytest.raises(ValueError, match="data.source='nosuch://a/b' cannot be read"):
    build("nosuch://a/b", tmp_path)


def test_links_and_dots_of_a_table_do_not_lead_out(store, tmp_path):
  put(store.rsplit("/", 1)[0], {"secret.mp4": b"x"})
  put(store, {"meta.csv": b"file_name,text\n../secret.mp4,x\n/etc/passwd,y\na.mp4,z\n"})
  source = build(f"{store}/meta.csv", tmp_path)
  assert [source.info(i).name for i in range(len(source))] == ["a.mp4"] and len(source.rejects) == 2


def test_an_installed_package_announces_a_source(tmp_path, monkeypatch):
  (tmp_path / "announced.py").write_text(
    "import numpy as np\n"
    "def clips(count):\n"
    "  return [{'video': np.zeros((3, 40, 48, 3), np.uint8), 'caption': 'c', 'fps': 8}] * count\n"
  )
  info = tmp_path / "announced-1.0.dist-info"
  info.mkdir()
  (info / "METADATA").write_text("Metadata-Version: 2.1\nName: announced\nVersion: 1.0\n")
  (info / "entry_points.txt").write_text("[sora_jax.sources]\nmine_of_test = announced:clips\n")
  monkeypatch.syspath_prepend(str(tmp_path))
  source = build_source(DataConfig(source="mine_of_test", source_kwargs={"count": 4}))
  assert len(source) == 4 and source.info(3).captions == ("c",)
  with pytest.raises(ValueError, match=r"data.source='mine_of_test' \(announced:clips\).*count"):
    build_source(DataConfig(source="mine_of_test"))
  with pytest.raises(ValueError, match="nor one of .*mine_of_test, .*synthetic"):
    build_source(DataConfig(source="not_announced"))
