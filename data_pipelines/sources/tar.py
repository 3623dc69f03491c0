"""Webdataset archives: key.mp4 + key.txt or key.json in a .tar, read in place by offset.

Headers are read here (POSIX ustar and pax, GNU long names), so that names are never paths: nothing is
unpacked, links and devices are left out, and the walk through a damaged archive ends.
"""

import dataclasses
import os
import posixpath
from collections.abc import Iterator
from pathlib import Path
from typing import BinaryIO, NamedTuple

from data_pipelines.parts import Part
from data_pipelines.sources import captions, paths
from data_pipelines.sources.base import Entry, Found, ReadOptions, UnreadableError
from data_pipelines.sources.folder import is_media
from data_pipelines.sources.frame_folders import is_image

_BLOCK = 512
MAX_TEXT = 2**20  # bytes of a caption, or of a long name
_LINKS = b"12"
_COMPRESSED = (b"\x1f\x8b", b"BZh", b"\xfd7zXZ", b"\x28\xb5\x2f\xfd")


class Member(NamedTuple):
  name: str
  kind: bytes
  offset: int
  size: int


def members(path: str | Path) -> Iterator[Member]:
  """Of an uncompressed archive, in order; ValueError where a header is damaged."""
  with open(path, "rb") as f:
    yield from walk(f, os.path.getsize(path), path)


def walk(f: BinaryIO, end: int, path: str | Path) -> Iterator[Member]:
  """The same of an open file of `end` bytes; only headers and long names are read."""
  at, long_name, long_size = 0, None, None
  while at + _BLOCK <= end:
    f.seek(at)
    header = f.read(_BLOCK)
    if not header.strip(b"\0"):
      return
    if header.startswith(_COMPRESSED):
      raise ValueError(f"{path} is compressed: members of it cannot be read at random; decompress it")
    name, size, kind = _parse(header, path, at)
    is_meta = kind in b"LxKgX"
    if not is_meta and long_size is not None:
      size = long_size
    if at + _BLOCK + size > end:
      raise ValueError(f"{path} is cut off: its member at byte {at} ends beyond the file")
    if is_meta:
      content = f.read(size) if size <= MAX_TEXT else b""
      if kind == b"L":
        long_name = content.rstrip(b"\0").decode("utf-8", "replace")
      elif kind in b"xX":
        fields = _pax(content)
        long_name = fields.get("path", long_name)
        long_size = int(s) if (s := fields.get("size", "")).isdecimal() and len(s) < 20 else None
    else:
      yield Member(long_name or name, kind, at + _BLOCK, size)
      long_name = long_size = None
    at += _BLOCK + -(-size // _BLOCK) * _BLOCK


def _parse(header: bytes, path: str | Path, at: int) -> tuple[str, int, bytes]:
  stated = _number(header[148:156])
  if stated != sum(header[:148]) + 8 * 32 + sum(header[156:]):
    raise ValueError(f"{path} is not a tar archive, or damaged at byte {at} (the sum of a header is wrong)")
  size = _number(header[124:136])
  if size is None:
    raise ValueError(f"{path} is damaged at byte {at}: a member without a size")
  name = header[:100].split(b"\0")[0].decode("utf-8", "replace")
  prefix = header[345:500].split(b"\0")[0].decode("utf-8", "replace")
  if header[257:263] == b"ustar\0" and prefix:
    name = f"{prefix}/{name}"
  return name, size, header[156:157]


def _number(field: bytes) -> int | None:
  if field[:1] == b"\x80":
    return int.from_bytes(field[1:], "big")
  digits = field.strip(b" \0")
  return int(digits, 8) if digits and all(c in b"01234567" for c in digits) else None


def _pax(content: bytes) -> dict[str, str]:
  fields = {}
  while content:
    length, _, _ = content.partition(b" ")
    if not length.isdigit() or not len(length) < int(length[:9]) <= len(content):
      break
    key, _, value = content[len(length) + 1 : int(length)].partition(b"=")
    fields[key.decode("utf-8", "replace")] = value.rstrip(b"\n").decode("utf-8", "replace")
    content = content[int(length) :]
  return fields


def archives_of(folder: Path) -> list[Path]:
  found = [f for f in folder.glob("*.tar") if not f.name.startswith(".")]
  return sorted(found, key=lambda f: paths.natural_key(f.name))


def read(path: Path, options: ReadOptions) -> Found:
  """One archive, or those of a folder in the order of their names."""
  root = path if path.is_dir() else path.parent
  found = Found(root, [], [])
  for archive in archives_of(path) if path.is_dir() else [path]:
    try:
      absolute = paths.resolve(archive, root, allow_outside_root=options.allow_outside_root)
    except UnreadableError as e:
      found.rejects.append((archive.name, str(e)))
      continue
    _read_archive(absolute, archive.name, found, options)
  remedy = "each key.mp4 needs a key.txt or key.json"
  captions.require(found.entries, str(path), remedy, captions_optional=options.captions_optional)
  if not found.entries and not found.rejects:
    raise ValueError(f"{path} holds no video or image")
  return found


def _read_archive(path: str, name: str, found: Found, options: ReadOptions) -> None:
  groups: dict[str, dict[str, Member]] = {}
  try:
    for member in members(path):
      parts = member.name.split("/")
      if member.kind == b"5":
        continue
      if member.name.startswith("/") or ".." in parts or "\0" in member.name:
        found.rejects.append((f"{name}/{member.name}", "unsafe_name"))
      elif member.kind not in (b"0", b"\0", b"7"):
        kind = "link" if member.kind in _LINKS else "no_file"
        found.rejects.append((f"{name}/{member.name}", f"{kind}: members of this kind are not read"))
      elif parts[-1] and not parts[-1].startswith("."):
        stem, _, suffix = parts[-1].partition(".")
        groups.setdefault(posixpath.join(*parts[:-1], stem), {})[suffix.lower()] = member
  except (OSError, ValueError) as e:
    if not groups:
      raise ValueError(str(e)) from e
    found.rejects.append((name, f"truncated: {e}"))
  for key, group in groups.items():
    media = [m for m in group.values() if is_media(m.name)]
    if not media:
      found.rejects.append((f"{name}/{key}", f"no_media: {', '.join(group)}"))
      continue
    medium = min(media, key=lambda m: is_image(m.name))  # a video before its thumbnail
    try:
      texts = _captions(path, group, f"{name}/{key}", options.caption_column)
    except UnreadableError as e:
      found.rejects.append((f"{name}/{medium.name}", str(e)))
      continue
    entry = Entry(f"{name}/{medium.name}", path, texts, _label(path, group))
    found.entries.append(dataclasses.replace(entry, span=(medium.offset, medium.size)))


def _captions(path: str, group: dict[str, Member], key: str, column: str) -> tuple[str, ...]:
  """key.txt and its like (key.caption, key.prompt), else what a key.json says."""
  for suffix in (column,) if column in group else captions.COLUMNS:
    if suffix in group and (texts := captions.clean(_text(path, group[suffix]))):
      return texts
  return captions.of_json(_text(path, group["json"]), f"{key}.json", column) if "json" in group else ()


def _label(path: str, group: dict[str, Member]) -> int:
  text = _text(path, group["cls"]).strip() if "cls" in group else ""
  return int(text) if text.isdecimal() and len(text) < 10 else -1


def _text(path: str, member: Member) -> str:
  if member.size > MAX_TEXT:
    raise UnreadableError("caption_unreadable", f"{member.name} has {member.size} bytes")
  return Part(path, member.offset, member.size).read().decode("utf-8-sig", "replace")
