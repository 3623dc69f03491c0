"""The index of prepared shards: held or mapped, whole or wrong."""

import json
import os
import pickle
import shutil
import tempfile
from pathlib import Path

import fsspec
import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import pytest

from data_pipelines import benchmark_index, shard_bytes
from data_pipelines.parts import UnreadableError
from data_pipelines.pipeline import DataConfig, build_source
from data_pipelines.sources import paths, shard_index, shards
from data_pipelines.sources.shards import ShardSource
from tests.prepared import make_set, run_inline, whole


@pytest.fixture(scope="module")
def prepared(tmp_path_factory):
  folder = tmp_path_factory.mktemp("prepared")
  run_inline(make_set(folder / "data", clips=5), folder / "out", stages=("probe", "write"), codec="jpeg")
  return folder / "out"


def test_little_of_the_index_stays_in_memory(prepared):
  """Numbers, captions and names: of millions of samples every process holds as much."""
  source = ShardSource(str(prepared))
  kept = source._index.texts.nbytes + sum(column.nbytes for column in source._numbers.values())
  rows = [source.row(i) for i in range(5)]
  letters = sum(len(row["source"]) + sum(map(len, row["captions"])) for row in rows)
  assert kept < letters + 5 * 80 + 100 and rows[3]["hashes"]


@pytest.mark.parametrize("scheme", ["", "memory://"])
def test_a_large_index_is_mapped(prepared, tmp_path, monkeypatch, capsys, scheme):
  """Many row groups and parts; the same samples as one that is held."""
  out, cache = tmp_path / "set", tmp_path / "cache"
  shutil.copytree(prepared, out)
  table = pq.read_table(out / "index.parquet")
  many = pa.concat_tables([table] * 40)
  starts = pa.array(np.arange(len(many)) / 8, many.schema.field("start_s").type)
  put_index(
    out, many.set_column(many.schema.get_field_index("start_s"), "start_s", starts), row_group_size=30
  )
  held = build_source(DataConfig(source=str(out)))
  monkeypatch.setattr(shard_index, "HELD_BYTES", 0)
  monkeypatch.setattr(shard_index, "_PART", 7)
  address = f"{scheme}{out}"
  if scheme:
    fsspec.filesystem("memory").put(str(out) + "/", address + "/", recursive=True)
  config = DataConfig(source=address, index_dir=str(cache))
  source, again = build_source(config), pickle.loads(pickle.dumps(build_source(config)))
  assert capsys.readouterr().err.count("written out once") == 1
  assert isinstance(source._numbers["offset"].base, np.memmap)
  assert len(source._index.texts["source"].chunks) > 20
  for i in (0, 6, 7, 29, 30, 199):
    assert source.info(i) == again.info(i) == held.info(i) and source.row(i) == held.row(i)
    assert (whole(again, i) == whole(held, i)).all()
  assert list(source.names()) == list(held.names()) == [held.info(i).name for i in range(200)]
  assert all((a == b).all() for a, b in zip(source.sizes(), held.sizes()))
  assert "place" in source._numbers and (source.places() == held.places()).all()
  assert source.fingerprint() == held.fingerprint()
  assert not list(cache.glob("*.part"))


def test_a_user_without_a_home_has_a_cache(monkeypatch):
  monkeypatch.delenv("XDG_CACHE_HOME", raising=False)
  monkeypatch.delenv("HOME", raising=False)
  monkeypatch.setattr(os, "getuid", lambda: 4_000_000_000)
  assert paths.cache_home() == Path(tempfile.gettempdir(), "sora_jax", "index")


def test_a_large_index_that_cannot_be_mapped_is_one_line(prepared, tmp_path, monkeypatch):
  out, cache = tmp_path / "set", tmp_path / "cache"
  shutil.copytree(prepared, out)
  monkeypatch.setattr(shard_index, "HELD_BYTES", 0)
  (tmp_path / "file").touch()
  with pytest.raises(ValueError, match="cannot be written out to .*Not a directory; see data.index_dir"):
    ShardSource(str(out), index_dir=str(tmp_path / "file" / "cache"))
  put_index(out, pq.read_table(out / "index.parquet").drop_columns(["offset"]))
  with pytest.raises(ValueError, match="set/index.parquet: has no column offset"):
    ShardSource(str(out), index_dir=str(cache))
  (out / "index.parquet").write_bytes((out / "index.parquet").read_bytes() + b"0")
  with pytest.raises(ValueError, match="is not the one that .* describe"):
    ShardSource(str(out), index_dir=str(cache))
  assert [path.suffix for path in cache.iterdir()] == [".lock"]
  about = json.loads((out / "shards.json").read_text())
  (out / "shards.json").write_text(json.dumps(about | {"index_checksum": "x/../../../elsewhere"}))
  with pytest.raises(ValueError, match="cannot have the checksum 'x/../../../elsewhere'"):
    ShardSource(str(out), index_dir=str(cache))


def with_column(folder, name, value):
  """The index with one value throughout a column, and a description that calls it the right one."""
  table = pq.read_table(folder / "index.parquet")
  column = table.schema.get_field_index(name)
  values = pa.array([value] * len(table), table.schema.field(name).type)
  put_index(folder, table.set_column(column, name, values))


def put_index(folder, table, **how):
  pq.write_table(table, folder / "index.parquet", **how)
  about = json.loads((folder / "shards.json").read_text())
  about["index_checksum"] = shard_bytes.digest((folder / "index.parquet").read_bytes())
  (folder / "shards.json").write_text(json.dumps(about))


@pytest.mark.parametrize(
  "name,value,line",
  [
    *(
      ("shard", v, "not within the set")
      for v in ("../secret", "/etc/passwd", "a/../../b", "only", "a/", "a/b/c")
    ),
    ("shard", None, "column shard has empty cells"),
    ("captions", None, "column captions has empty cells"),
    ("num_frames", 0, "column num_frames has values below 1"),
    ("offset", -1, "column offset has values below 0"),
    ("fps", float("nan"), "column fps has values below 0"),
  ],
)
def test_an_index_cannot_lead_outside_or_astray(prepared, tmp_path, name, value, line):
  shutil.copytree(prepared, tmp_path / "set")
  with_column(tmp_path / "set", name, value)
  with pytest.raises(ValueError, match=line):
    ShardSource(str(tmp_path / "set"))


def test_a_span_beyond_the_shard_takes_no_memory(prepared, tmp_path):
  shutil.copytree(prepared, tmp_path / "set")
  with_column(tmp_path / "set", "span", 2**50)
  with pytest.raises(UnreadableError, match="truncated"):
    whole(ShardSource(str(tmp_path / "set")), 0)


@pytest.mark.parametrize("name", [shards.INDEX, shards.ABOUT])
def test_an_index_that_is_a_link_is_not_followed_unless_allowed(prepared, tmp_path, name):
  out = tmp_path / "set"
  shutil.copytree(prepared, out)
  (out / name).rename(tmp_path / "elsewhere")
  (out / name).symlink_to(tmp_path / "elsewhere")
  with pytest.raises(ValueError, match=f"{name}: outside_root: .*data.allow_outside_root"):
    build_source(DataConfig(source=str(out)))
  source = build_source(DataConfig(source=str(out), allow_outside_root=True))
  assert whole(pickle.loads(pickle.dumps(source)), 0).any()


@pytest.mark.slow
def test_the_benchmark_of_the_index():
  """Nothing of a mapped index is a process's own."""
  made, first, mapped, held = benchmark_index.index(600_000)
  assert made["samples"] == 600_000 and [x["way"] for x in (first, mapped, held)] == [
    "mapped, first",
    "mapped",
    "held",
  ]
  assert mapped["own_memory_mb"] < 20 < 100 < held["own_memory_mb"]
