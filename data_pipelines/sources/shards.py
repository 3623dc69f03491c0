"""Our own shards, as `python -m data_pipelines.prepare` writes them: pixels or latents, local or remote.

The index says where each record lies, so a record is one read of a range of bytes, of a file or of an object
(any fsspec address: gs://, s3://, memory://); no shard is opened before. Each record is checked by its CRC.
"""

import collections
import contextlib
import json
import os
import threading
import zlib
from collections.abc import Iterator, Sequence
from typing import Any, BinaryIO

import fsspec
import numpy as np

from data_pipelines import clip_codec, media_io, shard_bytes, shard_records
from data_pipelines.parts import UnreadableError, patiently
from data_pipelines.sources import paths, shard_index
from data_pipelines.sources.base import SampleInfo, Sizes, require_encoder
from sora_jax.packing.geometry import ClipSpec

FORMAT, VERSION = "sora_jax shards", 1
INDEX, ABOUT = "index.parquet", "shards.json"
STATE = ".prepare"  # folder of a preparation
_MAX_OPEN = 128
PIXELS = ""  # encoder of a set that holds pixels


def is_prepared(path: str) -> bool:
  """A folder, or an address, with our description in it; ValueError where that is yet to come."""
  if "://" not in path:
    folder = os.path.expanduser(path)
    is_whole = os.path.isfile(os.path.join(folder, ABOUT))
    if not is_whole and os.path.isdir(os.path.join(folder, STATE)):
      raise ValueError(
        f"{path} holds shards that are not finished: run its preparation again, the stage write too"
      )
    return is_whole
  try:
    store, root = fsspec.url_to_fs(path)
    return store.exists(f"{root.rstrip('/')}/{ABOUT}")
  except (ImportError, ValueError, OSError):  # whoever reads other addresses says what is wrong with this one
    return False


class ShardSource:
  """`encoder` is the hash of the one whose latents are wanted, "" = pixels; None takes what the set holds.

  Links out of the set are refused unless `allow_outside_root`.
  """

  def __init__(
    self, path: str, encoder: str | None = None, *, allow_outside_root: bool = False, index_dir: str = ""
  ):
    self.name, self._path = path, path if "://" in path else os.path.expanduser(path)
    self._allow_outside_root, self._index_dir = allow_outside_root, index_dir
    self._files = _Files(self._path, allow_outside_root)
    about = _about(self._files, path)
    self.encoder_hash: str = about["encoder"]
    self.text_encoder_hash: str = about["text_encoder"]
    if encoder is not None:
      require_encoder(self.name, self.encoder_hash, encoder)
    self._mark: str = about["index_checksum"]
    self._index, self._last = self._read_index(), threading.local()
    self._numbers, self._texts = self._index.numbers, dict(zip(shard_index.TEXTS, self._index.texts.columns))
    self._rows: shard_index.Rows | None = None
    self.rejects: list[tuple[str, str]] = []
    self.channels = int(self._numbers["channels"][0])

  def _read_index(self) -> shard_index.Index:
    where = f"{self.name}/{INDEX}"
    if self._files.size(INDEX) > shard_index.HELD_BYTES:
      return shard_index.map_out(where, lambda: self._files.open(INDEX), self._mark, self._index_dir)
    data = self._files.whole(INDEX)
    if self._mark != shard_bytes.digest(data):
      raise ValueError(f"{where} is not the one that {ABOUT} describes: run the preparation again")
    return shard_index.hold(where, data)

  def __reduce__(self):  # a worker process opens its own files
    return (_reopened, (self._path, self.encoder_hash, self._allow_outside_root, self._index_dir))

  def __len__(self) -> int:
    return len(self._index)

  def info(self, i: int) -> SampleInfo:
    """Sizes of a latent set count latent cells; no shard is opened."""
    numbers = self._numbers
    start = float(numbers["start_s"][i])
    return SampleInfo(
      id=i,
      name=shard_index.name_of(self._texts["source"][i].as_py(), start),
      num_frames=int(numbers["num_frames"][i]),
      height=int(numbers["height"][i]),
      width=int(numbers["width"][i]),
      fps=float(numbers["fps"][i]),
      captions=tuple(self._texts["captions"][i].as_py()),
      label=int(numbers["label"][i]),
      start_s=start,
    )

  def sizes(self) -> Sizes:
    return Sizes(*(self._numbers[name] for name in Sizes._fields))

  def names(self) -> Iterator[str]:
    return self._index.names()

  def places(self) -> np.ndarray:
    return self._index.places()

  def row(self, i: int) -> dict[str, Any]:
    """All that the index knows: source, start_s, stop_s, bucket, scores, ...; read when first asked."""
    if self._rows is None:
      self._rows = shard_index.Rows(self._files.open(INDEX))
    row = self._rows[i]
    return row | {"scores": json.loads(row["scores"])}

  def faults(self) -> Iterator[str]:
    """A line for shards that are not there or not of their size; none is opened."""
    shards = _about(self._files, self.name).get("shards") or []
    sizes = self._files.sizes([shard["path"] for shard in shards])
    if wrong := [s["path"] for s in shards if sizes.get(s["path"]) != s["bytes"]]:
      yield (
        f"{self.name}: {len(wrong)} of {len(shards)} shards are missing or not of their size, "
        f"{paths.listed(wrong, 3)}: copy them again, or run the preparation again"
      )

  def load(self, i: int, spec: ClipSpec, start_s: float = 0.0) -> np.ndarray:
    """uint8 (T, H, W, 3); of latents (T, h, w, C) as stored, float16 or bfloat16."""
    record = self._record(i)
    wanted = media_io.frame_numbers(spec, start_s, record["fps"])
    if record["kind"] == "pixels":
      _, height, width, _ = record["shape"]
      return clip_codec.decode(
        record["frames"],
        record["codec"],
        wanted,
        size=(height, width),
        height=spec.height,
        width=spec.width,
      )
    values = shard_records.array_of(record)
    if values.shape[1:3] != (spec.height, spec.width) or np.any(np.diff(wanted) != 1):
      raise ValueError(
        f"{self.name}: latents of {values.shape[2]}x{values.shape[1]} cells cannot be resized to "
        f"{spec.width}x{spec.height}, nor frames left out: raise data.max_tokens, set data.target_fps=0"
      )
    if wanted[-1] >= len(values):
      raise UnreadableError("truncated", f"latent frame {wanted[-1]} of {len(values)}")
    return values[wanted[0] : wanted[-1] + 1]

  def text(self, i: int, caption: int = 0) -> np.ndarray:
    """(tokens, width) of a caption's embedding, by `text_encoder_hash`."""
    texts = self._record(i).get("text")
    self._last.record = None
    if not isinstance(texts, list) or not 0 <= caption < len(texts) or not isinstance(texts[caption], dict):
      raise UnreadableError("no_text", f"record {i} has no embedding of caption {caption}")
    return shard_records.array_of(texts[caption])

  def text_tokens(self, i: int, caption: int = 0) -> int | None:
    counts = self._texts["text_tokens"][i].as_py()
    return (counts[caption] if counts and caption < len(counts) else 0) or None

  def fingerprint(self) -> str:
    return f"{self._mark}:{self.encoder_hash}"

  def _record(self, i: int) -> dict[str, Any]:
    """One that has texts is kept, by this thread, until they are asked for, which mostly comes next."""
    place, record = getattr(self._last, "record", None) or (-1, None)
    if place != i:
      record = self._read(i)
      self._last.record = (i, record) if self.text_encoder_hash else None
    return record

  def _read(self, i: int) -> dict[str, Any]:
    numbers = self._numbers
    shard = self._index.shards[numbers["shard"][i]]
    offset, span = int(numbers["offset"][i]), int(numbers["span"][i])
    data = self._files.record(shard, offset, span)
    if zlib.crc32(data) != numbers["crc32"][i]:
      raise UnreadableError("damaged", f"{shard}, record at byte {offset}: its checksum differs")
    return shard_records.unpack(data)


def _reopened(path: str, encoder: str, allow_outside_root: bool, index_dir: str) -> ShardSource:
  return ShardSource(path, encoder, allow_outside_root=allow_outside_root, index_dir=index_dir)


class _Files:
  """Ranges of bytes below a folder or an address."""

  def __init__(self, root: str, allow_outside_root: bool):
    self._root, self._allow_outside_root, self._lock = root, allow_outside_root, threading.Lock()
    self._remote = None
    if "://" in root:
      try:
        self._remote, self._root = fsspec.url_to_fs(root)
      except (ImportError, ValueError, OSError) as e:
        raise ValueError(f"data.source={root!r}: {e}") from e
    self._open: collections.OrderedDict[str, Any] = collections.OrderedDict()

  def whole(self, name: str) -> bytes:
    with self.open(name) as f:
      return f.read()

  def size(self, name: str) -> int:
    with self._told(name):
      return self._remote.size(self._object(name)) if self._remote else os.path.getsize(self._local(name))

  def sizes(self, names: Sequence[str]) -> dict[str, int]:
    """Of those that are there."""
    if self._remote:
      found = self._remote.find(self._root, detail=True)
      return {name: found[path]["size"] for name in names if (path := self._object(name)) in found}
    return {name: os.path.getsize(path) for name in names if os.path.isfile(path := self._local(name))}

  def open(self, name: str) -> BinaryIO:
    with self._told(name):
      return self._remote.open(self._object(name)) if self._remote else open(self._local(name), "rb")  # noqa: SIM115

  @contextlib.contextmanager
  def _told(self, name: str):
    try:
      yield
    except UnreadableError as e:
      raise ValueError(f"{self._root}/{name}: {e}") from e
    except OSError as e:
      raise ValueError(f"{self._root}/{name} cannot be read: {e.strerror or e}") from e

  def _object(self, name: str) -> str:
    return f"{self._root.rstrip('/')}/{name}"

  def record(self, name: str, offset: int, size: int) -> memoryview:
    """The record in so many bytes of a shard."""
    if self._remote is not None:
      path, stop = self._object(name), offset + size
      data = patiently(name, lambda: self._remote.cat_file(path, start=offset, end=stop))
      record = shard_bytes.record_of(data, offset) if len(data) == size else None
    else:
      record = patiently(name, lambda: self._local_record(name, offset, size))
    if record is None:
      raise UnreadableError("truncated", f"{name} ends before byte {offset + size}")
    return record

  def _local_record(self, name: str, offset: int, size: int) -> memoryview | None:
    file = self._file(name)
    try:
      if offset + size > os.fstat(file.fileno()).st_size:  # no memory is taken for it
        return None
      return shard_bytes.read_record(file.fileno(), offset, size)
    except OSError:  # of a network's disk the file may have to be opened anew
      with self._lock:
        self._open.pop(name, None)
      raise

  def _local(self, name: str) -> str:
    path = os.path.join(self._root, name)
    return paths.resolve(path, self._root, allow_outside_root=self._allow_outside_root)

  def _file(self, name: str):
    """An open file; the caller's hold on it keeps it open though others push it out."""
    with self._lock:
      file = self._open.pop(name, None)
      if file is None:
        file = open(self._local(name), "rb")  # noqa: SIM115, closed when no one holds it
      self._open[name] = file
      if len(self._open) > _MAX_OPEN:
        self._open.popitem(last=False)
      return file


def _about(files: _Files, path: str) -> dict[str, Any]:
  try:
    about = json.loads(files.whole(ABOUT))
  except (ValueError, RecursionError) as e:
    raise ValueError(f"{path} holds no shards of ours: {e}") from e
  if not isinstance(about, dict) or about.get("format") != FORMAT or about.get("version") != VERSION:
    raise ValueError(f"{path}/{ABOUT} is no description of {FORMAT}, version {VERSION}")
  for key in ("encoder", "text_encoder", "index_checksum"):
    if not isinstance(about.get(key), str):
      raise ValueError(f"{path}/{ABOUT} has no {key}")
  return about
