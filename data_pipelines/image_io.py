"""Images of any mode and kind to RGB, and which kind of file one is: by content, never by name."""

import io

import numpy as np
from PIL import Image, ImageOps

from data_pipelines import color
from data_pipelines.parts import Media, Part, UnreadableError, open_bytes

MAX_PIXELS = 2**27


def sniff(path: Media) -> str:
  """ "image" or "video", by content; raises where there is nothing to read."""
  try:
    with open_bytes(path) as f:
      head = f.read(32)
  except OSError as e:
    raise UnreadableError("missing" if isinstance(e, FileNotFoundError) else "unreadable", e.strerror) from e
  if not head:
    raise UnreadableError("empty", "0 bytes")
  if head.startswith(b"GIF8"):
    with open_image(path) as image:
      return "video" if getattr(image, "n_frames", 1) > 1 else "image"
  is_image = (
    head.startswith((b"\xff\xd8\xff", b"\x89PNG\r\n\x1a\n", b"BM", b"II*\0", b"MM\0*"))
    or (head.startswith(b"RIFF") and head[8:12] == b"WEBP")
    or head[4:12] in (b"ftypavif", b"ftypavis", b"ftypheic", b"ftypmif1")
  )
  return "image" if is_image else "video"


def open_image(path: Media) -> Image.Image:
  try:
    image = Image.open(io.BytesIO(path.read()) if isinstance(path, Part) else path)
  except Image.DecompressionBombError as e:
    raise UnreadableError("too_large", str(e)) from e
  except (OSError, ValueError, SyntaxError) as e:
    raise UnreadableError("unreadable", "not an image that Pillow can read") from e
  if image.width * image.height > MAX_PIXELS:
    raise UnreadableError("too_large", f"{image.width}x{image.height}")
  return image


def probe_image_header(path: Media) -> tuple[int, int]:
  """(width, height) as displayed, no pixel decoded."""
  if sniff(path) != "image":
    raise UnreadableError("unreadable", f"{path} is no image")
  with open_image(path) as image:
    return image.size[::-1] if image.getexif().get(0x0112, 1) >= 5 else image.size


def read_image(path: Media, height: int, width: int) -> np.ndarray:
  try:
    with open_image(path) as image:
      image = color.to_rgb_image(ImageOps.exif_transpose(image))
      if image.size != (width, height):
        image = image.resize((width, height), Image.Resampling.BICUBIC, reducing_gap=3.0)
      return np.asarray(image, np.uint8)[None]
  except (OSError, ValueError, SyntaxError) as e:
    raise UnreadableError("truncated", str(e)) from e
