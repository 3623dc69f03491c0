"""Which source a `config.data.source` names."""

import dataclasses
import os
from collections.abc import Callable
from pathlib import Path
from typing import NamedTuple

from data_pipelines.config import DataConfig
from data_pipelines.sources import custom, formats, shards
from data_pipelines.sources.base import Found, ReadOptions, Source
from data_pipelines.sources.files import FileSource
from data_pipelines.sources.synthetic import SyntheticSource

Factory = Callable[[DataConfig], Source]
_factories: dict[str, Factory] = {}


def register(name: str) -> Callable[[Factory], Factory]:
  """`@register("mine")` makes `data.source="mine"` call the function with the DataConfig."""

  def add(factory: Factory) -> Factory:
    if _factories.get(name, factory) is not factory:
      raise ValueError(f"two sources are registered as {name!r}")
    _factories[name] = factory
    return factory

  return add


class Located(NamedTuple):
  """Files that were named, none of them opened yet."""

  name: str
  form: str
  found: Found


def build_source(config: DataConfig) -> Source:
  """A registered name, else "module:Name", else shards, else a path in one of the formats of `formats.py`."""
  located = locate(config)
  return files_of(*located, config) if isinstance(located, Located) else located


def locate(config: DataConfig) -> Source | Located:
  if config.source in _factories:
    return _factories[config.source](config)
  if shards.is_prepared(config.source):
    return shards.ShardSource(config.source, **config.source_kwargs)
  path, options = Path(os.path.expanduser(config.source)), read_options(config)
  if custom.is_custom(config.source) and not path.exists():
    found = custom.adapt(custom.make(config.source, config), config.source, options)
    return Located(config.source, "custom", found) if isinstance(found, Found) else found
  # Open-Sora leaves foo.parquet away where the folder foo/ holds its shards.
  if not path.exists() and not (path.suffix == ".parquet" and path.with_suffix("").is_dir()):
    raise ValueError(
      f"data.source={config.source!r} is neither a file or folder nor one of {', '.join(sorted(_factories))}"
    )
  form, found = formats.read(path, options, config.format)
  return Located(str(path), form, found)


def files_of(name: str, form: str, found: Found, config: DataConfig) -> FileSource:
  return FileSource(
    name,
    *found,
    min_size=config.min_size,
    max_aspect=config.max_aspect,
    decode_limit_s=config.decode_limit_s,
    threads=config.threads,
    cache_dir=config.index_dir,
    form=form,
  )


def read_options(config: DataConfig) -> ReadOptions:
  return ReadOptions(**{f.name: getattr(config, f.name) for f in dataclasses.fields(ReadOptions)})


@register("synthetic")
def _synthetic(config: DataConfig) -> Source:
  return SyntheticSource(config.num_samples, config.seed, **config.source_kwargs)
