"""Writes one shard: read, crop, resize, caption, encode, store. The same bytes for the same shard.

A shard is finished where its note in .prepare/shards says so, with its mark and its size. It is written
aside, flushed to disk and renamed before that, so that no half of one ever has its name.
"""

import json
import os
import zlib
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
from array_record.python import array_record_module

from data_pipelines import clip_codec, shard_bytes, shard_records
from data_pipelines.parts import UnreadableError
from data_pipelines.prepare import hooks, state
from data_pipelines.prepare.config import PrepareConfig
from data_pipelines.prepare.inputs import known_medium
from data_pipelines.prepare.plan import Sample, Shard
from data_pipelines.sources import captions as captions_lib
from sora_jax.packing.geometry import ClipSpec, num_tokens


def write_shard(
  shard: Shard,
  out: Path,
  source: Any,
  config: PrepareConfig,
  failed: dict[str, str],
  at: Callable[[str], None],
) -> dict[str, Any]:
  """The note of the shard; `failed` are samples (by id) that ended a worker, `at` says which one is next."""
  path = out / shard.path
  path.parent.mkdir(parents=True, exist_ok=True)
  part = path.with_name(f".{path.name}.{os.getpid()}.part")
  rows, dropped = [], []
  writer = array_record_module.ArrayRecordWriter(str(part), shard_bytes.WRITER_OPTIONS)
  try:
    for sample in shard.samples:
      if sample.id in failed:
        dropped.append(_drop(sample, *failed[sample.id].partition(": ")[::2]))
        continue
      at(sample.id)
      try:
        data, row = make_record(sample, source, config)
      except UnreadableError as e:
        dropped.append(_drop(sample, e.reason, e.detail))
        continue
      writer.write(data)
      rows.append(row)
  finally:
    writer.close()
  for row, (offset, size) in zip(rows, shard_bytes.record_spans(part, len(rows))):
    row["offset"], row["span"] = offset, size
  note = {
    "path": shard.path,
    "bucket": shard.bucket,
    "mark": shard.mark,
    "records": len(rows),
    "bytes": part.stat().st_size,
    "checksum": checksum(part),
    "rows": rows,
    "dropped": dropped,
  }
  _flush(part)
  os.replace(part, path)
  shard_bytes.fsync_folder(path.parent)
  state.write_json(note_path(out, shard.key), note, flush=True)
  return note


def finished_note(out: Path, shard: Shard) -> dict[str, Any] | None:
  note = state.read_json(note_path(out, shard.key))
  if note is None or note.get("mark") != shard.mark or note.get("path") != shard.path:
    return None
  try:
    size = (out / shard.path).stat().st_size
  except OSError:
    return None
  return note if size == note.get("bytes") else None


def note_path(out: Path, key: str) -> Path:
  return out / state.FOLDER / "shards" / f"{key}.json"


def checksum(path: Path) -> str:
  with open(path, "rb") as f:
    return shard_bytes.digest_file(f)


def make_record(sample: Sample, source: Any, config: PrepareConfig) -> tuple[bytes, dict[str, Any]]:
  """(the bytes of a record, its row of the index)."""
  name = sample.item.name
  medium = known_medium(sample.item, source, sample.whole, sample.info)
  spec = ClipSpec(sample.num_frames, sample.height, sample.width, sample.fps)
  frames = medium.read(spec, sample.start_s, sample.crop)
  texts = sample.item.captions
  if config.has("caption"):
    texts = captions_lib.clean(hooks.captions(config.caption, name, frames, texts))
  record = {"id": sample.id, "captions": list(texts), **_picture(frames, sample, config)}
  if config.has("encode_text"):
    record["text_encoder"] = hooks.encoder_hash(config.text)
    record["text"] = [_embedding(text, name, config) if text else None for text in texts]
  data = shard_records.pack(record)
  return data, {**_row(sample, record, config), "bytes": len(data), "crc32": zlib.crc32(data)}


def _embedding(caption: str, where: str, config: PrepareConfig) -> dict[str, Any]:
  made = hooks.array(config.text, where, hooks.call(config.text, where, caption), 2)
  return _packed(made, config.text, where, config.latent_dtype)


def _packed(values: np.ndarray, hook: str, where: str, dtype: str) -> dict[str, Any]:
  packed = shard_records.pack_array(values, dtype)
  if not np.isfinite(shard_records.array_of(packed)).all():
    raise hooks.HookError(f"{hook} gives values for {where} that {dtype} cannot hold: see --latent_dtype")
  return packed


def _picture(frames: np.ndarray, sample: Sample, config: PrepareConfig) -> dict[str, Any]:
  """Coded pixels, or latents."""
  if not config.has("encode_latents"):
    codec = "png" if sample.num_frames == 1 and config.codec != "jpeg" else config.codec
    coded = clip_codec.encode(frames, codec)
    shape = list(frames.shape)
    return {"kind": "pixels", "shape": shape, "codec": codec, "frames": coded, "fps": float(sample.fps)}
  name, hook = sample.item.name, config.latents
  values = hooks.encode(hook, name, frames)
  fps = float(sample.fps / hooks.latent_factors(hook)[0]) if len(values) > 1 else 0.0
  packed = _packed(values, hook, name, config.latent_dtype)
  return {"kind": "latent", "encoder": hooks.encoder_hash(hook), "fps": fps, **packed}


def _row(sample: Sample, record: dict[str, Any], config: PrepareConfig) -> dict[str, Any]:
  shape = record["shape"]
  tokens = shape[0] * shape[1] * shape[2]
  if record["kind"] == "pixels":
    padded = [-(-n // p) * p for n, p in zip(shape, config.patch)]
    tokens = num_tokens(ClipSpec(*padded), config.patch)
  return {
    "id": sample.id,
    "num_frames": shape[0],
    "height": shape[1],
    "width": shape[2],
    "channels": shape[3],
    "fps": record["fps"],
    "pixel_frames": sample.num_frames,
    "pixel_height": sample.height,
    "pixel_width": sample.width,
    "tokens": tokens,
    "captions": record["captions"],
    "label": sample.item.label,
    "source": sample.item.name,
    "start_s": sample.start_s,
    "stop_s": sample.start_s + (sample.num_frames / sample.fps if sample.fps else 0.0),
    "crop": list(sample.crop) if sample.crop else None,
    "hashes": list(sample.hashes),
    "scores": json.dumps(sample.scores, sort_keys=True),
    "encoder": record.get("encoder", ""),
    "text_encoder": record.get("text_encoder", ""),
    "text_tokens": [made["shape"][0] if made else 0 for made in record["text"]] if "text" in record else None,
  }


def _drop(sample: Sample, rule: str, detail: str) -> dict[str, Any]:
  return {"name": sample.item.name, "rule": rule, "detail": detail, "start_s": sample.start_s, "thumb": ""}


def _flush(path: Path) -> None:
  with open(path, "rb+") as f:
    os.fsync(f.fileno())
