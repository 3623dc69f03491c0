"""`tfds:NAME/SPLIT`: prepared sets of TensorFlow Datasets in ArrayRecord files, read without TensorFlow.

Read so: tensors, texts, class labels, and images, which stay encoded until they are drawn. Not without
TensorFlow, and so refused: the Video feature, whose very description needs it, and files of another form
(TFRecord); sets that hold videos as the bytes of a file (a Text or string Tensor feature) are read.
"""

import importlib
import re
from collections.abc import Mapping
from typing import Any

import numpy as np

from data_pipelines.config import DataConfig
from data_pipelines.sources import captions, custom

PREFIX = "tfds:"
_MEDIA = ("video", "mp4", "video_bytes", "image", "frames", "clip")


def read(config: DataConfig) -> custom.ArraySource:
  name, _, split = config.source.removeprefix(PREFIX).rpartition("/")
  if not name or not split:
    raise ValueError(f"data.source={config.source!r} is not tfds:NAME/SPLIT, as tfds:mine/train")
  try:
    tfds = importlib.import_module("tensorflow_datasets")
    builder = tfds.builder(name, data_dir=config.data_root or None)
    encoded = {
      key: tfds.decode.SkipDecoding()
      for key, feature in builder.info.features.items()
      if type(feature).__name__ == "Image"
    }
    elements = builder.as_data_source(split, decoders=encoded or None)
  except Exception as e:  # noqa: BLE001, raises its own kinds, and ImportError where it wants TensorFlow
    is_needed = re.search(r"tensorflow(?!.datasets)", str(e).lower())
    remedy = "; it needs TensorFlow, which is not used here" if is_needed else ""
    told = str(e).strip().split("\n")[0][:300] or type(e).__name__
    where = f" in data.data_root={config.data_root}" if config.data_root else ""
    raise ValueError(f"data.source={config.source!r}{where} cannot be read: {told}{remedy}") from e
  if not len(elements):
    raise ValueError(f"data.source={config.source!r} has no samples")
  first = elements[0]
  wanted = (config.media_column,) if config.media_column else _MEDIA
  media = next((key for key in wanted if key in first), None)
  if media is None:
    raise ValueError(
      f"data.source={config.source!r} has no feature {' or '.join(wanted)}; it has {', '.join(first)}: "
      "set data.media_column"
    )
  items = Elements(elements, media)
  source = custom.ArraySource(items, config.source, caption_column=config.caption_column)
  if not config.captions_optional and not any(source.info(i).captions for i in range(len(source))):
    known = config.caption_column or ", ".join(captions.COLUMNS)
    raise ValueError(
      f"data.source={config.source!r} has no caption (a feature {known}); it has {', '.join(first)}: set "
      "data.caption_column or data.captions_optional=True"
    )
  return source


class Elements:
  """Elements of the set as the dicts that a list of one's own would hold."""

  def __init__(self, elements: Any, media: str):
    self._elements, self._media = elements, media

  def __len__(self) -> int:
    return len(self._elements)

  def __getitem__(self, i: int) -> dict[str, Any]:
    item = {key: _plain(value) for key, value in self._elements[i].items()}
    video = item.pop(self._media)
    if isinstance(video, str):
      video = video.encode("utf-8", "surrogateescape")
    if isinstance(video, np.ndarray) and video.ndim == 3:
      video = video[None]
    return {**item, "video": video}


def _plain(value: Any) -> Any:
  """Texts as str, but for bytes that are no text; numbers as those of Python."""
  if isinstance(value, Mapping):
    return {key: _plain(v) for key, v in value.items()}
  if isinstance(value, np.ndarray) and value.ndim == 0:
    value = value.item()
  if isinstance(value, (list, tuple)) or (isinstance(value, np.ndarray) and value.dtype == object):
    return [_plain(v) for v in value]
  if isinstance(value, np.generic):
    return value.item()
  if isinstance(value, bytes):
    try:
      return value.decode("utf-8")
    except UnicodeDecodeError:
      return value
  return value
