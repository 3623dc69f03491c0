"""python -m sora_jax.scaling_laws probe --workdir=RUN: what a linear layer reads off frozen features.

Colour, shape and direction of clips, read off a trained network (ladder/features.py), off the same network
as initialised and with random weights, and off the raw pixels. For each label, block, noise level and
penalty are chosen on validation clips, for every network alike (Xiang et al. 2023, arXiv:2303.09769, choose
block and level so); accuracy is that on test clips, for every seed of clips, noise and random weights. A
label that a network without training reads so well that no lead of MARGIN is left above it is shown but not
judged by. The weights are compared before and after. With --csv=DIR/results.csv: ability by compute, a dot a
run.
"""

import csv
import dataclasses
import itertools
import json
from collections.abc import Sequence

import jax
import numpy as np
from absl import flags
from flax import nnx

from sora_jax import trained
from sora_jax.evaluation import probe as probe_lib
from sora_jax.ladder import features
from sora_jax.ladder.plan import say
from sora_jax.scaling import abilities, ladder
from sora_jax.trained import TrainedRun
from sora_jax.training.digest import digest

FLAGS = flags.FLAGS
RESULT = "probe.json"
LABELS = ("colour", "shape", "direction")
SOURCES = {
  "trained": "trained",
  "initial": "as initialised",
  "random": "random weights",
  "pixels": "raw pixels",
}
UNTRAINED = ("initial", "random")
MARGIN = 0.15  # over networks that learned nothing: what counts as having learned
SEEDS = (0, 1, 2)


@dataclasses.dataclass(frozen=True)
class Place:
  """Where features are taken; of pixels there is one place only."""

  block: int = 0  # from 1
  noise_level: float = 0.0


@dataclasses.dataclass(frozen=True)
class Split:
  """Clips in order: learn from, choose by, judge by."""

  learn: int
  chosen: int  # end of those to choose by

  @classmethod
  def of(cls, num: int) -> "Split":
    return cls(num // 2, 2 * num // 3)


def define_flags() -> None:
  flags.DEFINE_integer(
    "num_clips", 1200, "probe: half to learn from, a sixth to choose by, a third to judge by.", lower_bound=60
  )
  flags.DEFINE_string("blocks", None, "probe: blocks to choose from, with commas. Default: all.")
  flags.DEFINE_string("noise_levels", "0.1,0.2,0.4,0.6", "probe: of the clips, t in [0, 1), to choose from.")


def main() -> int:
  if FLAGS.csv:
    return curves()
  if not FLAGS.workdir:
    raise ValueError("--workdir=RUN or --csv=results.csv is needed")
  levels = ladder.parse_numbers(FLAGS.noise_levels, "noise_levels", least=-1e-9)
  if max(levels) >= 1:
    raise ValueError(f"--noise_levels={FLAGS.noise_levels}: at t = 1 nothing of the clip is left")
  seeds = ladder.parse_seeds(FLAGS.seeds) if FLAGS.seeds else SEEDS
  run = trained.load(FLAGS.workdir)
  trained.require_pixels(run)
  depth = run.model.denoiser.config.depth
  blocks = [int(b) for b in ladder.parse_numbers(FLAGS.blocks, "blocks")] if FLAGS.blocks else []
  blocks = blocks or list(range(1, depth + 1))
  if not 1 <= min(blocks) <= max(blocks) <= depth:
    raise ValueError(f"--blocks={FLAGS.blocks}: the model has {depth}")
  before, weights = weights_digest(run.model), frozen(run.model)
  by_seed = []
  for seed in seeds:
    found = probe(run, blocks=blocks, levels=levels, num_clips=FLAGS.num_clips, seed=seed)
    by_seed.append({"seed": seed, **found})
    say(f"seed {seed}: " + ", ".join(f"{name} {found[name]['mean']:.3f}" for name in SOURCES))
  same = all(map(np.array_equal, weights, frozen(run.model)))
  result = {
    "step": run.step, "num_clips": FLAGS.num_clips, "blocks": blocks, "noise_levels": levels,
    "seeds": by_seed, **summary(by_seed),
    "digest_before": before, "digest_after": weights_digest(run.model), "unchanged": same,
  }  # fmt: skip
  (run.workdir / RESULT).write_text(json.dumps(result, indent=2) + "\n", encoding="utf-8")
  print(describe(result))
  print(run.workdir / RESULT)
  return 0


def probe(
  run: TrainedRun, *, blocks: Sequence[int], levels: Sequence[float], num_clips: int, seed: int
) -> dict:
  """Of each of SOURCES and LABELS: accuracy on the test clips, and the place that was chosen."""
  scenes = features.clips(num_clips, seed)
  labels = {label: np.array([getattr(scene, label) for scene in scenes]) for label in LABELS}
  batches = features.pack(run, scenes)
  networks = {
    "trained": (run.model, blocks),
    # Its blocks hand on what comes in: one is as good as another.
    "initial": (features.initial_weights(run, seed), blocks[:1]),
    "random": (features.random_weights(run.model, seed), blocks),
  }
  result = {}
  for name, (model, of_blocks) in networks.items():
    places = {}
    for level in levels:
      streams = features.embed(run, model, batches, noise_level=level, seed=seed)
      places |= {Place(block, level): streams[block - 1] for block in of_blocks}
    result[name] = best_of(places, labels)
  result["pixels"] = best_of({Place(): np.stack([features.pixels(scene) for scene in scenes])}, labels)
  return result


def best_of(places: dict[Place, np.ndarray], labels: dict[str, np.ndarray]) -> dict:
  """For each label the place and the penalty of most right validation clips, judged on the test clips."""
  split = Split.of(len(next(iter(labels.values()))))
  spaces = {place: probe_lib.space(x[: split.chosen]) for place, x in places.items()}
  result = {}
  for label, y in labels.items():
    choices = []
    for (place, space), penalty in itertools.product(spaces.items(), probe_lib.PENALTIES):
      z = space.of(places[place][: split.chosen])
      fitted = probe_lib.fit_at(z[: split.learn], y[: split.learn], penalty)
      # Of equals the strongest penalty, and the first place.
      score = fitted.accuracy(z[split.learn :], y[split.learn : split.chosen])
      choices.append((score, penalty, -len(choices), place))
    score, penalty, _, place = max(choices)
    z = spaces[place].of(places[place])
    fitted = probe_lib.fit_at(z[: split.chosen], y[: split.chosen], penalty)
    accuracy = fitted.accuracy(z[split.chosen :], y[split.chosen :])
    chosen = dataclasses.asdict(place) | {"penalty": penalty, "validation": score}
    result[label] = {"accuracy": accuracy} | chosen
  result["mean"] = float(np.mean([result[label]["accuracy"] for label in labels]))
  return result


def summary(by_seed: Sequence[dict]) -> dict:
  """Means over seeds; by how much the trained network leads, of each label and of the labels judged by."""
  scores = {
    source: {label: [one[source][label]["accuracy"] for one in by_seed] for label in LABELS}
    for source in SOURCES
  }
  means = {
    source: {label: float(np.mean(x)) for label, x in by_label.items()} for source, by_label in scores.items()
  }
  for source in SOURCES:
    means[source]["mean"] = float(np.mean([one[source]["mean"] for one in by_seed]))
  judged = [x for x in LABELS if max(means[source][x] for source in UNTRAINED) <= 1 - MARGIN]

  def leads(over: str) -> list[float]:
    """By seed, on the mean of the labels judged by."""
    ahead = [np.subtract(scores["trained"][label], scores[over][label]) for label in judged]
    return [float(x) for x in np.mean(ahead, axis=0)] if judged else []

  leads_over = {source: leads(source) for source in SOURCES if source != "trained"}
  enough = bool(judged) and min(min(leads_over[source]) for source in UNTRAINED) >= MARGIN
  return {
    "means": means,
    "judged": judged,
    "leads": leads_over,
    "leads_of_all": {source: means["trained"]["mean"] - means[source]["mean"] for source in leads_over},
    "leads_as_it_should": enough and min(leads_over["pixels"]) > 0,
  }


def frozen(model: nnx.Module) -> list[np.ndarray]:
  """Its numbers as bits: a NaN equals itself, and 0 is not -0."""
  leaves = jax.device_get(jax.tree.leaves(nnx.to_pure_dict(nnx.state(model))))
  return [np.frombuffer(np.ascontiguousarray(x).tobytes(), np.uint8) for x in leaves]


def weights_digest(model: nnx.Module) -> str:
  return digest(nnx.to_pure_dict(nnx.state(model)))


def describe(result: dict) -> str:
  columns = (*LABELS, "mean")
  lines = [f"{'test accuracy':<16}{'seed':>5}" + "".join(f"{label:>11}" for label in columns)]
  for source, name in SOURCES.items():
    for one in result["seeds"]:
      found = one[source]
      cells = [found[label]["accuracy"] for label in LABELS] + [found["mean"]]
      lines.append(f"{name:<16}{one['seed']:>5}" + "".join(f"{cell:>11.3f}" for cell in cells))
    cells = "".join(f"{result['means'][source][label]:>11.3f}" for label in columns)
    lines.append(f"{'':<16}{'mean':>5}{cells}")
  for label in LABELS:
    chosen = [one["trained"][label] for one in result["seeds"]]
    places = ", ".join(f"block {c['block']} at t = {c['noise_level']:g}" for c in chosen)
    lines.append(f"chosen on validation clips for {label}: {places}")
  for label in sorted(set(LABELS) - set(result["judged"])):
    lines.append(
      f"not judged by {label}: a network without training leaves no {100 * MARGIN:.0f} points above it"
    )
  judged = " and ".join(result["judged"]) or "nothing"
  for source, leads in result["leads"].items():
    shown = ", ".join(f"{100 * lead:+.1f}" for lead in leads) or "-"
    lines.append(
      f"trained over {SOURCES[source]}, points by seed on {judged}: {shown}; "
      f"on all labels {100 * result['leads_of_all'][source]:+.1f}"
    )
  lines.append(
    f"at least {100 * MARGIN:.0f} points over every network without training, and above pixels: "
    f"{'yes' if result['leads_as_it_should'] else 'NO'}"
  )
  lines.append(f"backbone {'unchanged bit for bit' if result['unchanged'] else 'CHANGED'}: digest "
               f"{result['digest_after']}")  # fmt: skip
  return "\n".join(lines)


def curves() -> int:
  """Ability by compute of every measured run."""
  if not FLAGS.output:
    raise ValueError("--output is missing: the folder for the figure")
  with open(FLAGS.csv, newline="", encoding="utf-8") as file:
    rows = list(csv.DictReader(file))
  for path in abilities.write(rows, FLAGS.output, where=FLAGS.csv):
    print(path)
  return 0
