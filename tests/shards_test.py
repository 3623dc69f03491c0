"""Reading our own shards: exact, at random, from anywhere, and nothing that they should not name."""

import json
import pickle
import shutil
import threading

import fsspec
import numpy as np
import pytest
from array_record.python import array_record_module

from data_pipelines import check, clip_codec, report, shard_bytes, shard_records
from data_pipelines.parts import UnreadableError
from data_pipelines.pipeline import DataConfig, Pipeline, batch_spec, build_source
from data_pipelines.sources import shards
from data_pipelines.sources.files import FileSource
from data_pipelines.sources.shards import ShardSource
from sora_jax.packing.geometry import ClipSpec
from tests.batches import assert_same, take
from tests.prepared import make_set, moving, run_inline, whole

ENCODER = """
class Pool:
  hash, factors, channels = "pool-v1", (1, 8, 8), 3
  def latent_frames(self, num_frames):
    return num_frames
  def encode(self, frames):
    t, h, w, c = frames.shape
    return frames.reshape(t, h // 8, 8, w // 8, 8, c).mean((2, 4)) / 127.5 - 1
"""


@pytest.fixture(scope="module")
def prepared(tmp_path_factory):
  """(data, {codec: folder of shards}), at native size and rate, so that frames can be compared."""
  folder = tmp_path_factory.mktemp("prepared")
  data = make_set(folder / "data", clips=5)
  (data / "0.txt").unlink()
  (data / "0.json").write_text(json.dumps({"captions": ["noise number 0", "the first"]}))
  for codec in ("jpeg", "h264", "raw"):
    run_inline(data, folder / codec, stages=("probe", "write"), codec=codec)
  return data, {codec: folder / codec for codec in ("jpeg", "h264", "raw")}


@pytest.fixture(scope="module")
def latents(tmp_path_factory):
  folder = tmp_path_factory.mktemp("latents")
  (folder / "shard_encoder.py").write_text(ENCODER)
  with pytest.MonkeyPatch.context() as patch:
    patch.syspath_prepend(str(folder))
    stages = ("probe", "resize", "encode_latents", "write")
    data = make_set(folder / "data", clips=3)
    run_inline(data, folder / "out", stages=stages, latents="shard_encoder:Pool")
    run_inline(data, folder / "pixels", stages=("probe", "resize", "write"), codec="raw")
  return folder / "out", folder / "pixels"


def tokenize(text: str) -> list[int]:
  return [1] * len(text.split())


@pytest.mark.parametrize("codec,error", [("raw", 0), ("jpeg", 2.0), ("h264", 2.5)])
def test_shards_give_what_the_files_give(prepared, codec, error):
  data, folders = prepared
  files, prepared_set = (
    build_source(DataConfig(source=str(data))),
    build_source(DataConfig(source=str(folders[codec]))),
  )
  assert isinstance(files, FileSource) and isinstance(prepared_set, ShardSource)
  assert len(files) == len(prepared_set) == 5
  place = {prepared_set.row(k)["source"]: k for k in range(5)}
  for i in range(5):
    was, k = files.info(i), place[files.info(i).name]
    now = prepared_set.info(k)
    assert (now.num_frames, now.height, now.width, now.fps, now.captions) == (
      was.num_frames, was.height, was.width, was.fps, was.captions
    )  # fmt: skip
    a, b = whole(files, i).astype(int), whole(prepared_set, k).astype(int)
    assert np.abs(a - b).mean() <= error
    # Any part, at any lower rate and size.
    for spec, start in (
      (ClipSpec(3, 48, 64, 6.0), 0.25),
      (ClipSpec(1, 24, 32), 0.5),
      (ClipSpec(5, 24, 32, 12.0), 0.0),
    ):
      difference = np.abs(files.load(i, spec, start).astype(int) - prepared_set.load(k, spec, start)).mean()
      assert difference <= error + (6 if spec.height == 24 else 0), (spec, difference)
  assert prepared_set.info(place["0.mp4"]).captions == ("noise number 0", "the first")


def test_the_index_alone_answers(prepared, tmp_path):
  _, folders = prepared
  shutil.copytree(folders["raw"], tmp_path / "set")
  for shard in (tmp_path / "set").glob("*/*.array_record"):
    shard.unlink()
  source = build_source(DataConfig(source=str(tmp_path / "set")))
  assert [source.info(i).height for i in range(5)] == [48] * 5
  assert [tuple(int(n[i]) for n in source.sizes()) for i in range(5)] == [
    (i.num_frames, i.height, i.width, i.fps) for i in map(source.info, range(5))
  ]
  row = source.row(2)
  assert row["start_s"] == 0 and row["stop_s"] == pytest.approx(row["num_frames"] / 12)
  assert set(row["scores"]) >= {"motion", "luma"} and len(row["hashes"]) == 3
  with pytest.raises(UnreadableError, match="unreadable"):
    whole(source, 0)


def test_they_are_array_records_that_others_can_read(prepared):
  _, folders = prepared
  source = ShardSource(str(folders["raw"]))
  rows = [source.row(i) for i in range(5)]
  for path in {row["shard"] for row in rows}:
    reader = array_record_module.ArrayRecordReader(str(folders["raw"] / path))
    mine = [row for row in rows if row["shard"] == path]
    assert reader.num_records() == len(mine)
    for row in mine:
      assert shard_records.unpack(reader.read([row["record"]])[0])["id"] == row["id"]
    reader.close()


def test_records_of_any_length_are_found_by_their_bytes(tmp_path):
  rng = np.random.default_rng(0)
  sizes = [*rng.integers(1, 300, 40), *rng.integers(1, 300_000, 40), 1, 65472, 65536, 1_000_000]
  records = [rng.bytes(int(n)) for n in sizes]
  writer = array_record_module.ArrayRecordWriter(str(tmp_path / "a"), shard_bytes.WRITER_OPTIONS)
  for record in records:
    writer.write(record)
  writer.close()
  data = (tmp_path / "a").read_bytes()
  spans = shard_bytes.record_spans(tmp_path / "a", len(records))
  assert [shard_bytes.record_of(data[at : at + n], at) for at, n in spans] == records
  with open(tmp_path / "a", "rb") as f:
    assert [shard_bytes.read_record(f.fileno(), at, n) for at, n in spans] == records
    with pytest.raises(UnreadableError, match="truncated"):
      shard_bytes.read_record(f.fileno(), spans[-1][0], len(data))


@pytest.mark.parametrize("captions", [["short"], ["long " * 2000]])
def test_latents_are_a_view_of_their_record(captions):
  values = np.arange(2 * 3 * 4 * 5, dtype=np.float16).reshape(2, 3, 4, 5)
  record = {"id": "x", "captions": captions, "kind": "latent", "encoder": "e", "fps": 1.0}
  record |= shard_records.pack_array(np.tile(values, (1, 1, 1, 8000)), "float16")
  record["text"] = [shard_records.pack_array(values[0, 0], "float16")]
  data = shard_records.pack(record)
  got = shard_records.unpack(memoryview(data))
  assert got == {"v": 1, **record} and list(got) == ["v", *record]
  shared = np.shares_memory(shard_records.array_of(got), np.frombuffer(data, np.uint8))
  assert shared == (len(captions[0]) < 4096)
  for bad in (data[:-1], data + b"\0"):
    with pytest.raises(UnreadableError, match="damaged"):
      shard_records.unpack(bad)


@pytest.mark.parametrize("scheme", ["memory", "file"])
def test_object_stores(prepared, scheme, tmp_path):
  _, folders = prepared
  address = f"{scheme}://{tmp_path}/set"
  fsspec.filesystem(scheme).put(str(folders["jpeg"]) + "/", address + "/", recursive=True)
  local, remote = ShardSource(str(folders["jpeg"])), build_source(DataConfig(source=address))
  for i in range(5):
    assert remote.info(i) == local.info(i)
    assert np.array_equal(whole(remote, i), whole(local, i))
  gone = f"{scheme}://{tmp_path}/gone"
  assert shards.is_prepared(address) and not shards.is_prepared(gone)
  with pytest.raises(ValueError, match="shards.json cannot be read"):
    ShardSource(gone)
  assert not shards.is_prepared("no_such_protocol://bucket/set")
  with pytest.raises(ValueError, match="no_such_protocol"):
    ShardSource("no_such_protocol://bucket/set")


def test_copies_threads_and_the_checker(prepared):
  _, folders = prepared
  source = ShardSource(str(folders["jpeg"]))
  copy = pickle.loads(pickle.dumps(source))
  assert copy.fingerprint() == source.fingerprint() and copy.info(3) == source.info(3)
  assert list(check.check_source(source, samples=5)) == []
  expected, wrong = [whole(source, i) for i in range(5)], []

  def read():
    for k in range(20):
      if not np.array_equal(whole(copy, k % 5), expected[k % 5]):
        wrong.append(k)

  threads = [threading.Thread(target=read) for _ in range(4)]
  for thread in threads:
    thread.start()
  for thread in threads:
    thread.join()
  assert not wrong


def test_batches_come_out_of_shards(prepared):
  _, folders = prepared
  config = DataConfig(source=str(folders["jpeg"]), patch=(1, 8, 8), rows=2, row_tokens=512, max_frames=8)
  pipeline = Pipeline(build_source(config), config, batch_spec(config), tokenize)
  batches = pipeline.batches()
  seen = [next(batches) for _ in range(4)]
  assert all(batch.unreadable_B.sum() == 0 for batch in seen)
  assert {int(i) for b in seen for i in b.sample_id_BN.ravel() if i >= 0} == set(range(5))


def test_latents_are_those_of_the_encoder(latents):
  out, pixels = latents
  source, plain = ShardSource(str(out), encoder="pool-v1"), ShardSource(str(pixels))
  place = {plain.row(k)["source"]: k for k in range(3)}
  for i in range(3):
    got, frames = whole(source, i), whole(plain, place[source.row(i)["source"]])
    t, h, w, c = frames.shape
    want = frames.reshape(t, h // 8, 8, w // 8, 8, c).mean((2, 4)) / 127.5 - 1
    assert got.dtype == np.float16 and np.abs(got - want).max() < 1e-3
    info = source.info(i)
    part = source.load(i, ClipSpec(2, info.height, info.width, info.fps), start_s=3 / info.fps)
    assert np.array_equal(part, got[3:5])
    with pytest.raises(ValueError, match="cannot be resized .* raise data.max_tokens"):
      source.load(i, ClipSpec(1, 1, 1))
    with pytest.raises(UnreadableError, match="truncated"):
      source.load(i, ClipSpec(2, info.height, info.width, info.fps), start_s=60.0)


def test_latents_of_another_encoder_are_refused(latents):
  out, pixels = latents
  for path, kwargs, line in (
    (out, {"encoder": ""}, "holds latents of encoder pool-v1, the run wants pixels: prepare it without"),
    (out, {"encoder": "vae-2"}, "holds latents of encoder pool-v1, the run wants latents of encoder vae-2"),
    (pixels, {"encoder": "vae-2"}, "holds pixels, the run wants latents of encoder vae-2"),
  ):
    with pytest.raises(ValueError, match=line) as e:
      build_source(DataConfig(source=str(path), source_kwargs=kwargs))
    assert "\n" not in str(e.value)
  assert (
    build_source(DataConfig(source=str(out), source_kwargs={"encoder": "pool-v1"})).encoder_hash == "pool-v1"
  )


def test_latents_made_now_or_before_give_the_same_batches(latents):
  """Through shards both: of exact pixels, and of what was made of them."""
  stored, pixels = latents
  keys = {"latent_channels": 3, "patch": (1, 1, 1), "rows": 2, "row_tokens": 512}

  def batches(source, encoder):
    config = DataConfig(source=str(source), latents=encoder, **keys)
    return take(Pipeline(build_source(config), config, batch_spec(config), tokenize), 4)

  for now, before in zip(batches(pixels, "shard_encoder:Pool"), batches(stored, "pool-v1")):
    assert (now.segment_BL > 0).any() and not now.unreadable_B.any()
    assert_same(now, before)


def test_latents_of_other_channels_are_refused(latents):
  out, _ = latents
  config = DataConfig(source=str(out), latents="pool-v1", latent_channels=4, patch=(1, 1, 1))
  with pytest.raises(ValueError, match="holds latents of 3 channels, data.latent_channels is 4"):
    Pipeline(build_source(config), config, batch_spec(config), str.split)


@pytest.mark.parametrize("scheme", ["", "memory://"])
def test_missing_shards_are_told(prepared, tmp_path, scheme, capsys):
  out = tmp_path / "set"
  shutil.copytree(prepared[1]["jpeg"], out)
  address = f"{scheme}{out}"

  def told():
    if scheme:
      fsspec.filesystem("memory").put(str(out) + "/", address + "/", recursive=True)
    code = report.main([f"--source={address}", "--patch=1,8,8", "--row_tokens=2048", "--max_frames=4"])
    err = capsys.readouterr().err
    assert list(check.check_source(build_source(DataConfig(source=address)), samples=0)) or not code
    return code, err

  assert told() == (0, "")
  first, second = sorted(out.glob("*/*.array_record"))[:2]
  first.write_bytes(first.read_bytes()[:-1])
  code, err = told()
  names = [path.relative_to(out).as_posix() for path in (first, second)]
  assert code == 1 and f"1 of 3 shards are missing or not of their size, {names[0]}: copy them again" in err
  second.unlink()
  if scheme:
    fsspec.filesystem("memory").rm(f"{address}/{names[1]}")
  assert f"2 of 3 shards are missing or not of their size, {names[0]}, {names[1]}: copy" in told()[1]


def test_a_set_that_is_not_finished_says_so(prepared, tmp_path):
  _, folders = prepared
  shutil.copytree(folders["jpeg"], tmp_path / "set")
  (tmp_path / "set" / "shards.json").unlink()
  with pytest.raises(ValueError, match="set holds shards that are not finished: run its preparation again"):
    build_source(DataConfig(source=str(tmp_path / "set")))


def test_what_is_damaged_is_one_sample_or_one_line(prepared, tmp_path):
  _, folders = prepared
  out = tmp_path / "set"
  shutil.copytree(folders["jpeg"], out)
  row = ShardSource(str(out)).row(0)
  shard = out / row["shard"]
  data = bytearray(shard.read_bytes())
  data[row["offset"] + row["span"] // 2] ^= 1
  shard.write_bytes(data)
  source = ShardSource(str(out))
  with pytest.raises(UnreadableError, match="damaged: .*checksum differs"):
    whole(source, 0)
  assert len(whole(source, 1))
  shard.write_bytes(data[: row["offset"] + 10])
  with pytest.raises(UnreadableError, match="truncated"):
    whole(ShardSource(str(out)), 0)
  index = (out / "index.parquet").read_bytes()
  (out / "index.parquet").write_bytes(index[:-5])
  with pytest.raises(ValueError, match="is not the one that shards.json describes"):
    ShardSource(str(out))
  (out / "shards.json").write_text("[1]")
  with pytest.raises(ValueError, match="no description of sora_jax shards"):
    ShardSource(str(out))


def test_a_shard_that_is_a_link_is_not_followed(prepared, tmp_path):
  _, folders = prepared
  out = tmp_path / "set"
  shutil.copytree(folders["jpeg"], out)
  shard = out / ShardSource(str(out)).row(0)["shard"]
  shard.rename(tmp_path / "elsewhere")
  shard.symlink_to(tmp_path / "elsewhere")
  with pytest.raises(UnreadableError, match="outside_root"):
    whole(ShardSource(str(out)), 0)
  shard.unlink()
  (tmp_path / "elsewhere").rename(shard)
  shard.parent.rename(tmp_path / "folder")
  shard.parent.symlink_to(tmp_path / "folder")
  with pytest.raises(UnreadableError, match="outside_root"):
    whole(ShardSource(str(out)), 0)


def test_mutated_records_are_unreadable_and_no_more():
  rng = np.random.default_rng(0)
  video = moving(0, 5, (32, 32))
  for codec in clip_codec.CODECS:
    coded = clip_codec.encode(video, codec)
    good = shard_records.pack(
      {"id": "x", "kind": "pixels", "shape": [5, 32, 32, 3], "fps": 12.0, "captions": [], "codec": codec,
       "frames": coded}
    )  # fmt: skip
    for _ in range(60):
      data = bytearray(good)
      for _ in range(int(rng.integers(1, 4))):
        data[int(rng.integers(len(data)))] = int(rng.integers(256))
      try:
        record = shard_records.unpack(bytes(data))
        clip = clip_codec.decode(
          record["frames"], record["codec"], list(range(5)), size=(32, 32), height=32, width=32
        )
        assert clip.shape == (5, 32, 32, 3)
      except UnreadableError:
        pass
