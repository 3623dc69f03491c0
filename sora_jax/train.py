"""python -m sora_jax.train --config=configs/NAME.py[:PRESET] --workdir=DIR [--config.SECTION.KEY=VALUE ...]

Trains what the config says; checkpoints, config, vocabulary, metrics and sample grids go to the workdir.
The same command again resumes; exit codes and what a run survives: docs/faults.md. Several processes: see
parallel/cluster.py, or --coordinator_address=HOST:PORT --num_processes=N --process_id=I.
"""

import dataclasses
import functools
import json
import os
from pathlib import Path

import jax
import ml_collections
import numpy as np
from absl import flags
from ml_collections import config_flags

from data_pipelines.pipeline import DataConfig, Pipeline, batch_spec, build_source, chosen_ids, part_ends
from data_pipelines.sources.base import NoCaptionsError, Source
from data_pipelines.texts import Embedder
from sora_jax import cli, sample_grid, trained
from sora_jax.conditioning import tokenizer as tokenizer_lib
from sora_jax.conditioning.text import TextConfig
from sora_jax.conditioning.tokenizer import Tokenizer
from sora_jax.diffusion.objectives import ObjectiveConfig
from sora_jax.generate import SampleConfig
from sora_jax.models.dit import DiTConfig
from sora_jax.parallel import agreement, cluster, exits, hostlog, multihost
from sora_jax.parallel.mesh import ROW_AXES, MeshConfig, local_rows, make_mesh
from sora_jax.parallel.sentinel import Sentinel
from sora_jax.tasks import registry
from sora_jax.trained import TEXT_ENCODER, TOKENIZER, WORDS
from sora_jax.training import checkpoint
from sora_jax.training.hooks import Hook
from sora_jax.training.loop import TrainConfig, fit
from sora_jax.training.optimizer import OptimizerConfig

FLAGS = flags.FLAGS
DATA = "data_fingerprint.txt"
MOST_CAPTIONED = 2**20  # samples, spread over all, whose captions a vocabulary is learned from
SECTIONS = {
  "model", "text", "diffusion", "data", "optimizer", "mesh", "train", "sample", "rehearse", "task", "seed",
}  # fmt: skip
# How the network is computed may change between starts of a run; what it is may not.
COMPUTE = ("dtype", "remat", "attention")
IDENTITY = (
  "task",
  "text",
  "data.patch",
  "diffusion.path",
  "diffusion.prediction",
  *(f"model.{field.name}" for field in dataclasses.fields(DiTConfig) if field.name not in COMPUTE),
)


def define_flags() -> None:
  config_flags.DEFINE_config_file("config", None, "FILE.py or FILE.py:PRESET, with a get_config(preset).")
  flags.DEFINE_string("workdir", None, "Folder of the run; made where missing, resumed where it holds a run.")
  flags.DEFINE_string("coordinator_address", None, "HOST:PORT of process 0, with the two flags below.")
  flags.DEFINE_integer("num_processes", None, "Processes of this run.")
  flags.DEFINE_integer("process_id", None, "Which of them this is, from 0.")
  flags.DEFINE_bool("check_config", False, "Say what is wrong with the config, and train nothing.")
  flags.DEFINE_integer("check_devices", 0, "With it: devices that the mesh and the rows must divide over.")
  flags.DEFINE_integer("check_slices", 1, "With it: slices of TPUs that these devices make up.")


def main(argv: list[str]) -> int:
  del argv
  if FLAGS.config is None or not FLAGS.workdir:
    raise ValueError("both --config=FILE.py and --workdir=DIR are needed")
  config, workdir = FLAGS.config, Path(FLAGS.workdir)
  if FLAGS.check_config:
    check_config(config, devices=FLAGS.check_devices, slices=FLAGS.check_slices)
    hostlog.say("the config holds no mistake that shows without devices and data")
    return exits.DONE
  explicit = {name: FLAGS[name].value for name in ("coordinator_address", "num_processes", "process_id")}
  cluster.join(cluster.find(os.environ, flags=explicit, tpu=cluster.has_tpu()))
  listener = Sentinel().start()
  agreement.check(agreement.facts(checkpoint.flatten(json.loads(json.dumps(config.to_dict())))))
  # Every section is read before anything slow, so that a wrong key fails at once.
  train, optimizer, data = check_config(config)
  mesh = make_mesh(registry.section(MeshConfig, config, "mesh"))
  hostlog.say(f"{jax.device_count()} x {jax.devices()[0].device_kind}, jax {jax.__version__}")

  spec, rows = batch_spec(data), local_rows(mesh, data.rows)
  workdir.mkdir(parents=True, exist_ok=True)
  hostlog.open_in(workdir, jax.process_index())
  source = readable_source(data)
  tokenizer = text_reader(workdir, source, data, config.text)
  task = registry.build(config, batch_spec=spec, vocab_size=tokenizer.vocab_size, parts=part_ends(source))
  pipeline = Pipeline(source, data, spec, tokenizer)
  hostlog.say(str(pipeline.report()))
  resolved = json.loads(json.dumps(config.to_dict()))
  checkpoint.check_config(workdir, resolved, IDENTITY)  # before anything of the workdir changes
  note_data(workdir, pipeline.fingerprint())
  held_out = None
  if data.num_eval or data.eval_fraction:
    held_out = Pipeline(source, data, spec, tokenizer, split="eval")
  result = fit(
    task,
    config=train,
    optimizer=optimizer,
    mesh=mesh,
    train_batches=functools.partial(pipeline.batches, rows=rows),
    # Read once, at the first evaluation.
    eval_batches=functools.cache(lambda: held_out.epoch_batches(rows)) if held_out else None,
    workdir=workdir,
    resolved_config=resolved,
    identity=IDENTITY,
    hooks=grids(config, pipeline, held_out, tokenizer),
    listener=listener,
    count=pipeline.tally,
  )
  if result.preempted:
    return exits.PREEMPTED
  hostlog.say(f"done: step {result.step}, checkpoints in {workdir / 'checkpoints'}")
  return 0


def check_config(
  config: ml_collections.ConfigDict, *, devices: int = 0, slices: int = 1
) -> tuple[TrainConfig, OptimizerConfig, DataConfig]:
  """Reads every section; with a number of devices, also whether mesh and rows fit them."""
  if unknown := sorted(set(config) - SECTIONS):
    raise ValueError(f"config has no section {', '.join(unknown)}; it has {', '.join(sorted(SECTIONS))}")
  train = dataclasses.replace(registry.section(TrainConfig, config, "train"), seed=config.seed)
  optimizer = registry.section(OptimizerConfig, config, "optimizer")
  data = registry.section(DataConfig, config, "data")
  registry.section(DiTConfig, config, "model")
  registry.section(SampleConfig, config, "sample")
  registry.section(ObjectiveConfig, config, "diffusion")
  registry.section(TextConfig, config, "text")
  mesh = registry.section(MeshConfig, config, "mesh")
  if data.rows % train.accumulate:
    raise ValueError(
      f"data.rows = {data.rows} does not split into train.accumulate = {train.accumulate} parts"
    )
  if devices:
    replica, fsdp, _, _ = mesh.sizes(devices, slices)
    if data.rows % (replica * fsdp * train.accumulate):
      raise ValueError(
        f"data.rows = {data.rows} is not a multiple of the {replica * fsdp} devices of mesh axes {ROW_AXES} "
        f"times train.accumulate = {train.accumulate}"
      )
  return train, optimizer, data


def readable_source(data: DataConfig) -> Source:
  """The source; where it lacks captions, the report on its files comes before the error."""
  try:
    return build_source(data)
  except NoCaptionsError:
    bare = dataclasses.replace(data, captions_optional=True, num_eval=0, eval_fraction=0.0)
    no_words = tokenizer_lib.train([], vocab_size=tokenizer_lib.SMALLEST, max_tokens=1)
    hostlog.say(str(Pipeline(build_source(bare), bare, batch_spec(bare), no_words, split="all").report()))
    raise


def note_data(workdir: Path, fingerprint: str) -> None:
  """Says so where a run goes on with other data than it began with: that is allowed, but no exact resume."""
  path = workdir / DATA
  old = path.read_text().strip() if path.is_file() else fingerprint
  if old != fingerprint:
    hostlog.say(
      f"note: the data or its settings changed since this run was last started ({old} -> {fingerprint})"
    )
  if multihost.is_main():
    path.write_text(fingerprint + "\n")


def text_reader(
  workdir: Path, source: Source, data: DataConfig, text: ml_collections.ConfigDict
) -> Tokenizer | Embedder:
  """The run's vocabulary, or what embeds captions for it; a run keeps the kind of text that it began with."""
  mark = workdir / TEXT_ENCODER
  if (workdir / TOKENIZER if data.text else mark).is_file():
    raise ValueError(
      f"workdir {workdir} holds a run of another configuration: its text is "
      + ("token ids, not embeddings (data.text)" if data.text else "embeddings, not token ids (data.text)")
    )
  if not data.text:
    return vocabulary(workdir, source, data, text)
  embedder = Embedder(data.text, data.text_width, text.max_tokens)
  trained.check_text(workdir, embedder)
  if multihost.is_main():
    partial = mark.with_suffix(".tmp")
    partial.write_text(json.dumps({"hash": embedder.hash, "width": data.text_width}) + "\n", encoding="utf-8")
    partial.replace(mark)
  return embedder


def vocabulary(workdir: Path, source, data: DataConfig, text: ml_collections.ConfigDict) -> Tokenizer:
  """That of the workdir; learned from the captions to train on where there is none yet."""
  path = workdir / TOKENIZER
  if multihost.is_main() and not path.is_file():
    ids = chosen_ids(source, data, "train")
    ids = ids[np.linspace(0, len(ids) - 1, min(len(ids), MOST_CAPTIONED)).astype(np.int64)]
    known: set[str] = set()

    def captions():
      for caption in (c for i in ids.tolist() for c in source.info(i).captions):
        known.update(tokenizer_lib.words(caption))
        yield caption

    learned = tokenizer_lib.train(captions(), vocab_size=text.vocab_size, max_tokens=text.max_tokens)
    (workdir / WORDS).write_text("".join(f"{word}\n" for word in sorted(known)), encoding="utf-8")
    partial = path.with_suffix(".tmp")
    learned.save(partial)
    partial.replace(path)
  multihost.barrier("vocabulary")
  return tokenizer_lib.load(path, max_tokens=text.max_tokens)


def grids(
  config: ml_collections.ConfigDict,
  train: Pipeline,
  held_out: Pipeline | None,
  tokenizer: Tokenizer | Embedder,
) -> tuple[Hook, ...]:
  """Sample grids during training, of captions that are held out and of some that are not; none of latents."""
  if train.config.latents:
    if config.sample.num_samples:
      hostlog.say("no samples are drawn while training: nothing decodes latents yet")
    return ()
  sample, patch = registry.section(SampleConfig, config, "sample"), train.config.patch
  num_seen = sample.num_seen if held_out else sample.num_samples
  requests, labels, texts = [], [], {}
  for pipeline, count, note in (
    (held_out, sample.num_samples - num_seen, ""),
    (train, num_seen, "trained on: "),
  ):
    if pipeline and count > 0:
      new = sample_grid.requests_of(pipeline.infos, pipeline.specs, patch=patch, num_samples=count)
      requests += [dataclasses.replace(r, index=len(requests) + i) for i, r in enumerate(new)]
      labels += [note + r.prompt for r in new]
      texts |= embedded(pipeline, {r.prompt for r in new}) if train.config.text else {}
  if not requests:
    return ()
  hook = sample_grid.sample_hook(
    requests,
    labels,
    config=sample,
    diffusion=registry.section(ObjectiveConfig, config, "diffusion"),
    tokenize=texts.__getitem__ if train.config.text else tokenizer,
    spec=train.spec,
    patch=patch,
  )
  return (hook,)


def embedded(pipeline: Pipeline, captions: set[str]) -> dict[str, np.ndarray]:
  """Of captions of the data: a set that was prepared needs no encoder for them."""
  loader, texts = pipeline.loader, {}
  for info in pipeline.infos.values():
    first = next(iter(info.captions), "")
    if first in captions and first not in texts:
      texts[first] = loader.text(info, first)
  return texts


if __name__ == "__main__":
  define_flags()
  cli.run(main)
