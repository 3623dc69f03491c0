"""A trained run as its workdir holds it, ready to sample from."""

import dataclasses
import hashlib
import json
from collections.abc import Iterable, Sequence
from pathlib import Path

import jax
import ml_collections
import numpy as np
from flax import nnx
from jax.sharding import Mesh

from data_pipelines.config import DataConfig, batch_spec
from data_pipelines.texts import Embedder
from sora_jax.conditioning import tokenizer as tokenizer_lib
from sora_jax.conditioning.tokenizer import Tokenizer
from sora_jax.diffusion.objectives import ObjectiveConfig
from sora_jax.generate import Request, SampleConfig, generate
from sora_jax.parallel.mesh import MeshConfig, make_mesh
from sora_jax.tasks import registry
from sora_jax.training import checkpoint
from sora_jax.training import state as state_lib
from sora_jax.training.optimizer import OptimizerConfig
from sora_jax.types import BatchSpec

CONFIG, TOKENIZER, TEXT_ENCODER = "config.json", "tokenizer.json", "text_encoder.json"
WORDS = "words.txt"  # of the captions that the vocabulary was learned from


@dataclasses.dataclass(frozen=True, kw_only=True)
class TrainedRun:
  workdir: Path
  step: int  # of the checkpoint
  which: str  # "ema" or "params"
  config_digest: str
  tokenizer: Tokenizer | Embedder
  model: nnx.Module
  mesh: Mesh
  data: DataConfig
  diffusion: ObjectiveConfig
  sample: SampleConfig
  spec: BatchSpec


def load(
  workdir: str | Path, *, step: int | None = None, ema: bool = True, text_encoder: str = ""
) -> TrainedRun:
  """Config, vocabulary and weights of the newest sound checkpoint, or of that of `step`. `text_encoder` makes
  the embeddings of a run whose config names only the hash of theirs."""
  workdir = Path(workdir)
  _require(workdir, CONFIG)
  text = (workdir / CONFIG).read_text(encoding="utf-8")
  config = ml_collections.ConfigDict(json.loads(text))
  data = registry.section(DataConfig, config, "data")
  tokenizer = _text_reader(workdir, data, config.text.max_tokens, text_encoder)
  spec = batch_spec(data)
  task = registry.build(config, batch_spec=spec, vocab_size=tokenizer.vocab_size)
  mesh = make_mesh(MeshConfig())
  setup = state_lib.make_setup(task, optimizer=OptimizerConfig(), num_steps=1, mesh=mesh, seed=0)
  which = "ema" if ema else "params"
  found, params, rest, _ = checkpoint.restore_params(workdir, setup, which=which, step=step)
  return TrainedRun(
    workdir=workdir,
    step=found,
    which=which,
    config_digest=hashlib.sha256(text.encode()).hexdigest()[:16],
    tokenizer=tokenizer,
    model=setup.model(params, rest),
    mesh=mesh,
    data=data,
    diffusion=registry.section(ObjectiveConfig, config, "diffusion"),
    sample=registry.section(SampleConfig, config, "sample"),
    spec=spec,
  )


def _require(workdir: Path, name: str) -> None:
  if not (workdir / name).is_file():
    raise FileNotFoundError(f"{workdir} is not the workdir of a training run: it has no {name}")


def _text_reader(workdir: Path, data: DataConfig, max_tokens: int, text_encoder: str) -> Tokenizer | Embedder:
  if not data.text:
    _require(workdir, TOKENIZER)
    return tokenizer_lib.load(workdir / TOKENIZER, max_tokens=max_tokens)
  _require(workdir, TEXT_ENCODER)
  embedder = Embedder(text_encoder or data.text, data.text_width, max_tokens)
  check_text(workdir, embedder)
  return embedder


def check_text(workdir: Path, embedder: Embedder) -> None:
  """Refuses an encoder other than the one whose embeddings the run in `workdir` was trained on."""
  path = workdir / TEXT_ENCODER
  held = json.loads(path.read_text(encoding="utf-8")) if path.is_file() else {}
  if held and (held["hash"], held["width"]) != (embedder.hash, embedder.width):
    raise ValueError(
      f"{workdir} was trained on text embeddings of encoder {held['hash']}, of width {held['width']}; "
      f"{embedder.name} is encoder {embedder.hash}, of width {embedder.width}"
    )


def unknown_words(workdir: Path, texts: Iterable[str]) -> list[str]:
  """Those that stood in no caption of a run; none where its text is embeddings, whose encoder knows."""
  path = workdir / WORDS
  if not path.is_file():
    return []
  known = set(path.read_text(encoding="utf-8").split("\n"))
  return [w for w in dict.fromkeys(w for text in texts for w in tokenizer_lib.words(text)) if w not in known]


def require_pixels(run: TrainedRun) -> None:
  if run.data.latents:
    raise ValueError(
      f"{run.workdir} was trained on latents (data.latents={run.data.latents}), which nothing here decodes"
    )


def sample(run: TrainedRun, requests: Sequence[Request], config: SampleConfig) -> list[np.ndarray]:
  require_pixels(run)
  with jax.set_mesh(run.mesh):
    return generate(
      run.model,
      requests,
      config=config,
      diffusion=run.diffusion,
      tokenize=run.tokenizer,
      spec=run.spec,
      patch=run.data.patch,
    )
