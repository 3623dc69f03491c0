"""What a process holds of the index of a prepared set, held in memory or mapped."""

import json
import multiprocessing
import tempfile
import time
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa
import pyarrow.compute as pc
import pyarrow.parquet as pq

from data_pipelines import shard_bytes
from data_pipelines.config import DataConfig
from data_pipelines.pipeline import chosen_ids
from data_pipelines.sources import shard_index, shards

_GROUP = 2**20
_HELD_MOST = 20_000_000  # samples: some 400 bytes each
_ASKED = 10_000  # samples, anywhere
_WORDS = "a cat dog runs slowly over the red hill in morning light while clouds pass by"


def index(samples: int) -> list[dict[str, Any]]:
  """A line each for: mapped, the first time, when it is written out; mapped from then on; held."""
  with tempfile.TemporaryDirectory(prefix="sora_jax_index_") as folder:
    began = time.perf_counter()
    _make(Path(folder), samples)
    file_mb = (Path(folder) / shards.INDEX).stat().st_size / 2**20
    lines = [
      {"samples": samples, "parquet_mb": round(file_mb), "made_in_s": round(time.perf_counter() - began, 1)}
    ]
    context = multiprocessing.get_context("spawn")
    for way in ("mapped, first", "mapped", *(("held",) if samples <= _HELD_MOST else ())):
      with context.Pool(1) as pool:
        lines.append(pool.apply(_open, (folder, way)))
  return lines


def _open(folder: str, way: str) -> dict[str, Any]:
  shard_index.HELD_BYTES = 2**62 if way == "held" else 0
  before, began = _own_mb(), time.perf_counter()
  source = shards.ShardSource(folder, index_dir=f"{folder}/cache")
  opened_s, own = time.perf_counter() - began, _own_mb() - before
  places = np.random.default_rng(0).integers(0, len(source), _ASKED).tolist()
  began = time.perf_counter()
  for i in places:
    source.info(i)
  asked_us = 1e6 * (time.perf_counter() - began) / _ASKED
  began = time.perf_counter()
  held_out = len(chosen_ids(source, DataConfig(num_eval=1000), "eval"))
  assert held_out == 1000
  split_s = time.perf_counter() - began
  return {
    "way": way, "open_s": round(opened_s, 2), "own_memory_mb": round(own, 1), "info_us": round(asked_us, 1),
    "split_s": round(split_s, 1),
  }  # fmt: skip


def _own_mb() -> float:
  """Memory of this process alone: without mapped files, which processes share."""
  status = Path("/proc/self/status").read_text()
  return int(next(line for line in status.splitlines() if line.startswith("RssAnon")).split()[1]) / 2**10


def _make(folder: Path, samples: int) -> None:
  """As of clips of 200 to a shard, with captions of some 90 letters."""
  words = np.array(_WORDS.split())[np.random.default_rng(0).integers(16, size=(_GROUP, 18))].tolist()
  captions = pa.array([[" ".join(caption)] for caption in words])  # the same in each row group
  with pq.ParquetWriter(folder / shards.INDEX, shard_index.SCHEMA, compression="zstd") as writer:
    for first in range(0, samples, _GROUP):
      writer.write_table(_rows(first, captions[: samples - first]))
  with open(folder / shards.INDEX, "rb") as f:
    checksum = shard_bytes.digest_file(f)
  about = {"format": shards.FORMAT, "version": shards.VERSION, "encoder": "", "text_encoder": ""}
  (folder / shards.ABOUT).write_text(json.dumps(about | {"index_checksum": checksum}))


def _rows(first: int, captions: pa.Array) -> pa.Table:
  number = np.arange(first, first + len(captions))
  columns: dict[str, Any] = {
    "id": number,
    "shard": pc.binary_join_element_wise("480x854/", pa.array(number // 200).cast(pa.string()), ""),
    "source": pc.binary_join_element_wise("videos/", pa.array(number // 8).cast(pa.string()), ".mp4", ""),
    "captions": captions,
    "start_s": (number % 8) * 4.0,
    "fps": np.full(len(number), 24.0),
    "scores": ["{}"] * len(number),
  }
  arrays = []
  for field in shard_index.SCHEMA:
    if field.name in columns:
      arrays.append(pa.array(columns[field.name]).cast(field.type))
    elif pa.types.is_integer(field.type):
      arrays.append(pa.array(np.ones(len(number), np.int64)).cast(field.type))
    else:
      arrays.append(pa.nulls(len(number), field.type))
  return pa.table(arrays, schema=shard_index.SCHEMA)
