"""Which source a `config.data.source` names."""

import dataclasses
import os
from collections.abc import Callable
from importlib import metadata
from pathlib import Path
from typing import Any, NamedTuple

from data_pipelines.config import DataConfig
from data_pipelines.sources import custom, formats, mixture, remote, shards, tensorflow_datasets
from data_pipelines.sources.base import Found, ReadOptions, Source
from data_pipelines.sources.files import FileSource
from data_pipelines.sources.synthetic import SyntheticSource

ENTRY_POINTS = "sora_jax.sources"
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
  """What `data.sources` names, else `data.source`."""
  if config.sources:
    parts = mixture.part_configs(config)
    return mixture.MixedSource([(name, _opened(part), weight) for name, part, weight in parts])
  return _opened(config)


def _opened(config: DataConfig) -> Source:
  located = locate(config)
  return files_of(*located, config) if isinstance(located, Located) else located


def locate(config: DataConfig) -> Source | Located:
  """A registered name, shards that `prepare` wrote, a set of TFDS, a name that a package announces, an
  address, "module:Name", else a path in one of the formats of `formats.py`."""
  if config.source in _factories:
    return _factories[config.source](config)
  if shards.is_prepared(config.source):
    keys = {"allow_outside_root": config.allow_outside_root, "index_dir": config.index_dir}
    return shards.ShardSource(config.source, **(keys | config.source_kwargs))
  if config.source.startswith(tensorflow_datasets.PREFIX):
    return tensorflow_datasets.read(config)
  path, options = Path(os.path.expanduser(config.source)), read_options(config)
  if entry_point := _entry_points().get(config.source):
    return _found(config.source, custom.adapt(_load(entry_point, config), config.source, options))
  if remote.is_address(config.source):
    return Located(config.source, *remote.read(config.source, options, config.format))
  if custom.is_custom(config.source) and not path.exists():
    return _found(config.source, custom.adapt(custom.make(config.source, config), config.source, options))
  # Open-Sora leaves foo.parquet away where the folder foo/ holds its shards.
  if not path.exists() and not (path.suffix == ".parquet" and path.with_suffix("").is_dir()):
    raise ValueError(
      f"data.source={config.source!r} is neither a file or folder nor one of "
      f"{', '.join(sorted([*_factories, *_entry_points()]))}"
    )
  form, found = formats.read(path, options, config.format)
  return Located(str(path), form, found)


def _entry_points() -> dict[str, metadata.EntryPoint]:
  """Sources that installed packages announce in the group "sora_jax.sources"."""
  return {point.name: point for point in metadata.entry_points(group=ENTRY_POINTS)}


def _load(point: metadata.EntryPoint, config: DataConfig) -> Any:
  try:
    return point.load()(**config.source_kwargs)
  except (ImportError, AttributeError, TypeError) as e:
    raise ValueError(f"data.source={config.source!r} ({point.value}): {e}") from e


def _found(name: str, found: Found | Source) -> Source | Located:
  return Located(name, "custom", found) if isinstance(found, Found) else found


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
