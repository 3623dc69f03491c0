"""Tiny data sets for tests: the same two clips in many forms."""

import io
import json
import tarfile
from collections.abc import Iterable
from pathlib import Path

import av

from data_pipelines.pipeline import DataConfig, build_source
from tests import media

TEXTS = {"a": "a grey box", "b": "two, boxes"}


def build(source, **changes):
  return build_source(DataConfig(source=str(source), **changes))


def clip_bytes(plain, name):
  return Path(plain.root, f"{name}.mp4").read_bytes()


def put_clips(folder, plain):
  folder.mkdir(parents=True, exist_ok=True)
  for name in TEXTS:
    (folder / f"{name}.mp4").write_bytes(clip_bytes(plain, name))


def write_json(path, records, lines=False):
  path.write_text("\n".join(map(json.dumps, records)) if lines else json.dumps(records))


def write_csv(path, records, comma=","):
  lines = [comma.join(records[0])] + [comma.join(f'"{v}"' for v in r.values()) for r in records]
  path.write_text("\n".join(lines))


def tar_of(members: Iterable[tuple[str, bytes | tarfile.TarInfo]], form=tarfile.PAX_FORMAT) -> bytes:
  """Of (name, content), or a header that stands alone."""
  out = io.BytesIO()
  with tarfile.open(fileobj=out, mode="w", format=form) as tar:
    for name, content in members:
      if isinstance(content, tarfile.TarInfo):
        tar.addfile(content)
        continue
      info = tarfile.TarInfo(name)
      info.size = len(content)
      tar.addfile(info, io.BytesIO(content))
  return out.getvalue()


def put_frames(folder, clip_path, stop=99):
  """The frames of a clip as PNG files, as a decoder gives them."""
  folder.mkdir(parents=True)
  with av.open(str(clip_path)) as container:
    for i, frame in enumerate(container.decode(video=0)):
      if i < stop:
        frame.to_image().save(folder / f"frame_{i + 1}.png")


def make_plain(root):
  """The two clips with a.txt and b.txt beside them, as a source."""
  for i, (name, text) in enumerate(TEXTS.items()):
    media.make_clip(root / f"{name}.mp4", 6 + 2 * i, corner=bool(i))
    (root / f"{name}.txt").write_text(text)
  return build(root)
