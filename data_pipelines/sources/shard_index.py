"""The index of a prepared set: what reading goes by, in arrays.

That of a small set is held in memory. That of a large one is written out once, some thousands of samples at
a time, to a folder of this machine's cache, and mapped: the processes of a machine share what of it is in
memory, and the system takes that back when memory is wanted. Such a folder may be deleted at any time but
while it is read. Parquet itself cannot be mapped: a row of it is found by decoding thousands.
"""

import bisect
import contextlib
import dataclasses
import fcntl
import itertools
import json
import os
import re
import shutil
import sys
from collections.abc import Callable, Iterator, Mapping
from pathlib import Path
from typing import Any, BinaryIO

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq

from data_pipelines import shard_bytes
from data_pipelines.sources import paths
from data_pipelines.sources.base import place_of

SCHEMA = pa.schema(
  [
    ("id", pa.string()), ("shard", pa.string()), ("record", pa.int64()), ("offset", pa.int64()),
    ("span", pa.int64()), ("bytes", pa.int64()), ("crc32", pa.uint32()), ("bucket", pa.string()),
    ("num_frames", pa.int32()), ("height", pa.int32()), ("width", pa.int32()), ("channels", pa.int32()),
    ("fps", pa.float64()), ("pixel_frames", pa.int32()), ("pixel_height", pa.int32()),
    ("pixel_width", pa.int32()), ("tokens", pa.int64()), ("captions", pa.list_(pa.string())),
    ("label", pa.int32()), ("source", pa.string()), ("start_s", pa.float64()), ("stop_s", pa.float64()),
    ("crop", pa.list_(pa.int32())), ("hashes", pa.list_(pa.string())), ("scores", pa.string()),
    ("encoder", pa.string()), ("text_encoder", pa.string()), ("text_tokens", pa.list_(pa.int32())),
  ]
)  # fmt: skip
NUMBERS = (
  "num_frames", "height", "width", "channels", "fps", "label", "offset", "span", "crc32", "start_s"
)  # fmt: skip
TEXTS = ("source", "captions", "text_tokens")
HELD_BYTES = 2**26  # of a file: some million samples
_MAY_BE_EMPTY = ("text_tokens",)
_LEAST = {"num_frames": 1, "height": 1, "width": 1, "span": 1, "offset": 0, "fps": 0}
_PART = 2**16  # samples read at once
_VERSION = 1  # of the folder
_DTYPES = {name: SCHEMA.field(name).type.to_pandas_dtype() for name in NUMBERS}
_DTYPES |= {"shard": np.int32, "place": np.uint64}  # of the columns that are written out
_ABOUT, _TEXTS = "about.json", "texts.arrow"


@dataclasses.dataclass(frozen=True)
class Index:
  numbers: Mapping[str, np.ndarray]  # NUMBERS, "shard": which of `shards`, and of a mapped one "place"
  texts: pa.Table
  shards: tuple[str, ...]

  def __len__(self) -> int:
    return len(self.texts)

  def names(self) -> Iterator[str]:
    """Of all samples in their order, a part at a time."""
    first = 0
    for part in self.texts.select(["source"]).to_batches():
      yield from _names(part, self.numbers["start_s"][first : first + len(part)])
      first += len(part)

  def places(self) -> np.ndarray:
    """`place_of` each name; kept of a large set, of which it takes minutes."""
    if "place" in self.numbers:
      return self.numbers["place"]
    return np.fromiter(map(place_of, self.names()), np.uint64, len(self))


def name_of(source: str, start_s: float) -> str:
  return f"{source}@{start_s:g}s"


def _names(part: pa.RecordBatch | pa.Table, start_s: np.ndarray) -> Iterator[str]:
  return map(name_of, part["source"].to_pylist(), start_s.tolist())


def hold(where: str, data: bytes) -> Index:
  shards: dict[str, int] = {}
  parts = list(_parts(where, pa.BufferReader(data), shards))
  numbers = {name: np.concatenate([columns[name] for columns, _ in parts]) for name in parts[0][0]}
  return Index(numbers, pa.concat_tables(texts for _, texts in parts).combine_chunks(), tuple(shards))


def map_out(where: str, open_file: Callable[[], BinaryIO], checksum: str, cache: str = "") -> Index:
  """Of the file with that `checksum` (shard_bytes.digest); OSError of the cache, "" = the user's, is a
  ValueError."""
  if not re.fullmatch(r"[0-9a-f]{32}", checksum):  # it becomes the name of a folder
    raise ValueError(f"{where} cannot have the checksum {paths.one_line(checksum)!r}")
  home = Path(cache) if cache else paths.cache_home()
  folder = home / f"shards-{checksum}-{_VERSION}"
  try:
    home.mkdir(parents=True, exist_ok=True)
    with open(folder.with_suffix(".lock"), "w") as lock:  # the other processes of this machine wait for one
      fcntl.flock(lock, fcntl.LOCK_EX)
      if not (folder / _ABOUT).is_file():
        _write(where, open_file, checksum, folder)
    return _mapped(folder)
  except OSError as e:
    raise ValueError(
      f"{where} cannot be written out to {folder}: {e.strerror or e}; see data.index_dir"
    ) from e


def _write(where: str, open_file: Callable[[], BinaryIO], checksum: str, folder: Path) -> None:
  print(f"{where}: written out once to {folder}", file=sys.stderr, flush=True)
  part, shards = folder.with_suffix(".part"), {}
  shutil.rmtree(part, ignore_errors=True)
  part.mkdir()
  try:
    with open_file() as file, contextlib.ExitStack() as stack:
      if shard_bytes.digest_file(file) != checksum:
        raise ValueError(f"{where} is not the one that is described: run the preparation again")
      file.seek(0)
      sinks = {name: stack.enter_context(open(part / f"{name}.raw", "wb")) for name in _DTYPES}
      writer, count = None, 0
      for columns, texts in _parts(where, file, shards):
        place = np.fromiter(map(place_of, _names(texts, columns["start_s"])), np.uint64, len(texts))
        for name, values in {**columns, "place": place}.items():
          values.tofile(sinks[name])
        writer = writer or stack.enter_context(pa.ipc.new_file(part / _TEXTS, texts.schema))
        writer.write_table(texts)
        count += len(texts)
    about = {"samples": count, "shards": list(shards)}
    (part / _ABOUT).write_text(json.dumps(about), encoding="utf-8")
    os.replace(part, folder)
  except BaseException:
    shutil.rmtree(part, ignore_errors=True)
    raise


def _mapped(folder: Path) -> Index:
  about = json.loads((folder / _ABOUT).read_text(encoding="utf-8"))
  shape = (about["samples"],)
  numbers = {
    name: np.memmap(folder / f"{name}.raw", kind, "r", shape=shape) for name, kind in _DTYPES.items()
  }
  texts = pa.ipc.open_file(pa.memory_map(str(folder / _TEXTS))).read_all()
  return Index({name: np.asarray(column) for name, column in numbers.items()}, texts, tuple(about["shards"]))


def _parts(where: str, file: Any, shards: dict[str, int]) -> Iterator[tuple[dict[str, np.ndarray], pa.Table]]:
  """(numbers, texts) of some thousands of samples, looked through; `shards` gets the number of each."""
  channels = None
  try:
    reader = pq.ParquetFile(file)
    if not reader.metadata.num_rows:
      raise ValueError("has no samples")
    schema = pa.schema([SCHEMA.field(name) for name in ("shard", *NUMBERS, *TEXTS)])
    missing = [name for name in schema.names if name not in reader.schema_arrow.names]
    if lacking := [name for name in missing if name not in _MAY_BE_EMPTY]:
      raise ValueError(f"has no column {lacking[0]}")
    for batch in reader.iter_batches(_PART, columns=schema.names):
      table = pa.Table.from_batches([batch])
      for name in missing:  # of an index made before there was such a column
        table = table.append_column(schema.field(name), pa.nulls(len(batch), schema.field(name).type))
      table = table.select(schema.names).cast(schema)
      _check(table)
      columns = {name: table[name].to_numpy() for name in NUMBERS}
      channels = channels or columns["channels"][0]
      if (columns["channels"] != channels).any():
        raise ValueError("column channels has several values")
      columns["shard"] = _numbered(table["shard"].combine_chunks(), shards)
      yield columns, table.select(TEXTS)
  except (pa.ArrowException, OSError, ValueError) as e:
    raise ValueError(f"{where}: {str(e).splitlines()[0]}") from e


def _check(table: pa.Table) -> None:
  for name in table.schema.names:
    if table[name].null_count and name not in _MAY_BE_EMPTY:
      raise ValueError(f"column {name} has empty cells")
  for name, least in _LEAST.items():
    values = table[name].to_numpy()
    if not np.isfinite(values).all() or values.min() < least:
      raise ValueError(f"column {name} has values below {least}")


def _numbered(column: pa.Array, shards: dict[str, int]) -> np.ndarray:
  encoded = column.dictionary_encode()
  names = encoded.dictionary.to_pylist()
  for name in names:
    parts = name.split("/")
    if len(parts) != 2 or any(part in ("", ".", "..") or "\\" in part or "\0" in part for part in parts):
      raise ValueError(f"names a shard {name[:80]!r}: not within the set")
  numbers = [shards.setdefault(name, len(shards)) for name in names]
  return np.array(numbers, np.int32)[encoded.indices.to_numpy()]


class Rows:
  """Whole rows, a row group at a time: all that the index knows."""

  def __init__(self, file: BinaryIO):
    self._file = pq.ParquetFile(file)
    groups = self._file.metadata.num_row_groups
    counts = [self._file.metadata.row_group(k).num_rows for k in range(groups)]
    self._ends = list(itertools.accumulate(counts))
    self._last: tuple[int, pa.Table] | None = None

  def __getitem__(self, i: int) -> dict[str, Any]:
    k = bisect.bisect_right(self._ends, i)
    if self._last is None or self._last[0] != k:
      self._last = k, self._file.read_row_group(k)
    first = self._ends[k] - len(self._last[1])
    return dict.fromkeys(SCHEMA.names) | self._last[1].slice(i - first, 1).to_pylist()[0]
