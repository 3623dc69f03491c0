"""The records of a .csv, .tsv, .json, .jsonl or .parquet file."""

import csv
import io
import json
from pathlib import Path
from typing import Any

import pyarrow as pa
import pyarrow.parquet as pq

from data_pipelines.sources import paths

SUFFIXES = (".csv", ".tsv", ".jsonl", ".json", ".parquet")
TABLES = (*SUFFIXES, ".toml")  # of records, or of data sets (trainer_tables)
PICKLES = (".pkl", ".pickle", ".pth", ".pt")
_EXAMPLE = '{"path": "a.mp4", "caption": "..."}'

Record = dict[str, Any]


def read_records(manifest: Path) -> list[Record]:
  suffix = manifest.suffix.lower()
  if suffix in PICKLES:
    raise ValueError(f"{manifest} is a pickle, which can run any code when read: convert it to .json")
  if suffix == ".parquet" or (manifest.is_dir() and not suffix):
    return read_parquet(manifest)
  try:
    text = manifest.read_text(encoding="utf-8-sig")
  except UnicodeDecodeError as e:
    raise ValueError(f"{manifest} is not UTF-8 (byte {e.start}): convert it") from e
  except OSError as e:
    raise ValueError(f"cannot read {manifest}: {e.strerror}") from e
  if suffix in (".csv", ".tsv"):
    return _read_csv(manifest, text, "\t" if suffix == ".tsv" else ",")
  return _read_json(manifest, text, lines=suffix == ".jsonl")


def _read_csv(manifest: Path, text: str, delimiter: str) -> list[Record]:
  csv.field_size_limit(2**24)
  # Not by splitlines: captions have separators of their own, such as U+2028.
  reader = csv.DictReader(io.StringIO(text, newline=""), delimiter=delimiter, skipinitialspace=True)
  rows = []
  try:
    for row in reader:
      if any(cell.strip() for cell in row.pop(None, ())):
        raise ValueError(
          f"{manifest}, line {reader.line_num}: more cells than the {len(reader.fieldnames)} columns "
          f"{paths.listed(reader.fieldnames)}: a text with a {delimiter!r} in it needs quotes"
        )
      rows.append({(k or "").strip(): v for k, v in row.items()})
  except csv.Error as e:
    raise ValueError(f"{manifest} is not a CSV file: {e}") from e
  return rows


def _read_json(manifest: Path, text: str, *, lines: bool) -> list[Record]:
  number = 1
  try:
    if lines:
      records = []
      for number, line in enumerate(text.split("\n"), 1):  # noqa: B007, named in the error
        if line.strip():
          records.append(record := json.loads(line))
          if not isinstance(record, dict):
            raise ValueError(f"{line.strip()[:40]} is no record like {_EXAMPLE}")
    else:
      records = json.loads(text)
      records = records.get("data") if isinstance(records, dict) else records
  except json.JSONDecodeError as e:
    raise ValueError(f"{manifest}, line {number + e.lineno - 1}: {e.msg}") from e
  except (ValueError, RecursionError) as e:  # a number of too many digits, brackets too deep
    raise ValueError(f"{manifest}, line {number}: {e}") from e
  if not isinstance(records, list):
    raise ValueError(f"{manifest} holds no list of records like {_EXAMPLE}")
  for number, record in enumerate(records, 1):
    if not isinstance(record, dict):
      raise ValueError(f"{manifest}, record {number}: {json.dumps(record)[:40]} is no record like {_EXAMPLE}")
  return records


def read_parquet(manifest: Path) -> list[Record]:
  """Of foo.parquet where it has rows, else of its shards foo/*.parquet; of a folder, its shards."""
  return [record for _, records in parquet_parts(manifest) for record in records]


def parquet_parts(manifest: Path) -> list[tuple[Path, list[Record]]]:
  """The same by file."""
  shards = manifest if manifest.is_dir() else manifest.with_suffix("")
  whole = [(manifest, _rows(manifest))] if manifest.is_file() else []
  if (whole and whole[0][1]) or not shards.is_dir():
    return whole
  # A shard that links out of the folder is not one of it.
  home = shards.resolve()
  files = [f for f in shards.glob("*.parquet") if home in f.resolve().parents]
  return [(file, _rows(file)) for file in sorted(files, key=lambda f: paths.natural_key(f.name))]


def _rows(file: Path) -> list[Record]:
  """Columns of bytes (images, latents) are left where they are."""
  try:
    with pq.ParquetFile(file) as parquet:
      columns = [f.name for f in parquet.schema_arrow if not _holds_bytes(f.type)]
      return parquet.read(columns=columns).to_pylist()
  except (pa.ArrowException, OSError, ValueError, OverflowError) as e:
    raise ValueError(f"{file} is not a Parquet file: {str(e).splitlines()[0]}") from e


def _holds_bytes(kind: pa.DataType) -> bool:
  if pa.types.is_list(kind) or pa.types.is_large_list(kind):
    return _holds_bytes(kind.value_type)
  if pa.types.is_struct(kind):
    return any(_holds_bytes(kind.field(i).type) for i in range(kind.num_fields))
  return pa.types.is_binary(kind) or pa.types.is_large_binary(kind) or pa.types.is_fixed_size_binary(kind)
