"""Which source a `config.data.source` names."""

import os
from collections.abc import Callable
from pathlib import Path

from data_pipelines.config import DataConfig
from data_pipelines.sources import manifest
from data_pipelines.sources.base import Source
from data_pipelines.sources.files import FileSource
from data_pipelines.sources.folder import read_folder
from data_pipelines.sources.synthetic import SyntheticSource

Factory = Callable[[DataConfig], Source]
_factories: dict[str, Factory] = {}
_MANIFESTS = ("metadata.csv", "metadata.jsonl", "metadata.json", "videos2caption.json")


def register(name: str) -> Callable[[Factory], Factory]:
  """`@register("mine")` makes `data.source="mine"` call the function with the DataConfig."""

  def add(factory: Factory) -> Factory:
    if _factories.get(name, factory) is not factory:
      raise ValueError(f"two sources are registered as {name!r}")
    _factories[name] = factory
    return factory

  return add


def build_source(config: DataConfig) -> Source:
  """A registered name, else a manifest file, else a folder (with its metadata.* where there is one)."""
  if config.source in _factories:
    return _factories[config.source](config)
  path = Path(os.path.expanduser(config.source))
  if not path.exists():
    raise ValueError(
      f"data.source={config.source!r} is neither a file or folder nor one of {', '.join(sorted(_factories))}"
    )
  if path.is_dir():
    inside = next((path / m for m in _MANIFESTS if (path / m).is_file()), None)
    path = inside or path
  if path.is_dir():
    root, found = path, read_folder(path, **_limits(config))
  elif path.suffix.lower() in manifest.SUFFIXES:
    root = Path(config.data_root) if config.data_root else path.parent
    columns = {"media_column": config.media_column, "caption_column": config.caption_column}
    found = manifest.read_manifest(path, data_root=config.data_root, **columns, **_limits(config))
  else:
    raise ValueError(f"data.source={config.source!r} is no folder and no {' '.join(manifest.SUFFIXES)} file")
  return FileSource(
    str(path),
    root,
    *found,
    min_size=config.min_size,
    max_aspect=config.max_aspect,
    decode_limit_s=config.decode_limit_s,
    threads=config.threads,
    cache_dir=config.index_dir,
  )


def _limits(config: DataConfig) -> dict[str, bool]:
  return {
    "captions_optional": config.captions_optional,
    "allow_outside_root": config.allow_outside_root,
  }


@register("synthetic")
def _synthetic(config: DataConfig) -> Source:
  return SyntheticSource(config.num_samples, config.seed, **config.source_kwargs)
