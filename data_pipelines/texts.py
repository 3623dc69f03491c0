"""`data.text`: captions as embeddings of an encoder that is not trained, made while training or before."""

import inspect
from collections.abc import Callable
from typing import Any, Protocol

import jax
import numpy as np

from data_pipelines.config import DataConfig
from data_pipelines.named import named
from data_pipelines.sources.base import Source, require_encoder

DTYPE = np.float16  # of a batch; a set stored as this holds the same as is made while training


class Encoder(Protocol):
  """What "package.module:Class" names; made without arguments, in every worker process anew."""

  hash: str  # of weights and settings: another one gives other embeddings

  def __call__(self, caption: str) -> np.ndarray:
    """(tokens, data.text_width) floats, of one caption that is not empty."""
    ...


class Embedder:
  """caption -> float16 (M, width), M at most `max_tokens` (0 = as they come), none of an empty caption.

  `name` is that of an encoder, or only its hash: then what is stored is all that there is.
  """

  vocab_size = 0

  def __init__(self, name: str, width: int, max_tokens: int = 0):
    self.name, self.width, self.max_tokens = name, width, max_tokens
    self._encoder = _load(name) if ":" in name else None
    self.hash = self._encoder.hash if self._encoder else name

  def __reduce__(self):
    return (Embedder, (self.name, self.width, self.max_tokens))

  def __call__(self, caption: str) -> np.ndarray:
    if not caption:
      return np.zeros((0, self.width), DTYPE)
    if self._encoder is None:
      raise ValueError(
        f'data.text={self.name!r} is only the hash of an encoder: "package.module:Class" is needed to embed '
        f"{caption[:60]!r}"
      )
    try:
      with jax.transfer_guard("allow"):  # the training loop forbids what an encoder on a device must do
        made = np.asarray(self._encoder(caption))
    except Exception as e:  # noqa: BLE001, code of others
      raise ValueError(f"data.text={self.name!r} fails on {caption[:60]!r}: {type(e).__name__}: {e}") from e
    return self.fitted(made, repr(caption[:60]))

  def fitted(self, made: np.ndarray, where: str) -> np.ndarray:
    """An embedding as batches have it: a copy, cut and rounded."""
    if made.ndim != 2 or made.shape[1] != self.width or not len(made):
      raise ValueError(
        f"the embedding of {where} has shape {made.shape}: (tokens, {self.width}) is needed, by "
        "data.text_width"
      )
    with np.errstate(over="ignore"):
      kept = np.array(made[: self.max_tokens or None], DTYPE)
    if not np.isfinite(kept).all():
      raise ValueError(f"the embedding of {where} has values that float16 cannot hold")
    return kept


def reader(config: DataConfig, otherwise: Callable[[str], Any], max_tokens: int = 0) -> Any:
  """caption -> text of a batch: embeddings where `data.text` asks for them, else `otherwise`."""
  return Embedder(config.text, config.text_width, max_tokens) if config.text else otherwise


def require(source: Source, embedder: Embedder) -> None:
  """Embeddings that a source holds are of this encoder; where it holds none, there is one to make them."""
  for held in held_by(source):
    if held or ":" not in embedder.name:
      require_encoder(source.name, held, embedder.hash, what="text embeddings", instead="no text embeddings")


def held_by(source: Source) -> tuple[str, ...]:
  """Hashes of the encoders whose embeddings a source, or those of a mixture, have; "" = none."""
  return getattr(source, "text_encoder_hashes", None) or (getattr(source, "text_encoder_hash", ""),)


def _load(name: str) -> Any:
  made = named(name, f"data.text={name!r}")
  try:
    encoder = made() if inspect.isclass(made) else made
  except (ImportError, AttributeError, TypeError, OSError) as e:
    raise ValueError(f"data.text={name!r}: {e}") from e
  if not isinstance(getattr(encoder, "hash", None), str) or not encoder.hash or not callable(encoder):
    raise ValueError(f"data.text={name!r} has no hash or cannot be called: see data_pipelines/texts.py")
  return encoder
