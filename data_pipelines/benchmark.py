"""python -m data_pipelines.benchmark --what=padding|planning [--json]: what feeding a run costs.

padding   what packing wastes, by mix of sizes, and how unlike the rows of a step are
planning  memory and time of the plan of --samples=10000000 samples, at steps anywhere in the run
"""

import argparse
import json
import resource
import sys
import time
from collections.abc import Sequence

import numpy as np

from data_pipelines.mixes import MIXES, draw
from data_pipelines.pipeline import DataConfig, Pipeline, batch_spec
from data_pipelines.sources.base import SampleInfo, Sizes
from sora_jax.packing.plan import METHODS, RowPlan

_SAMPLES = 200_000
_STEPS = 200


def main(argv: Sequence[str] | None = None) -> int:
  parser = argparse.ArgumentParser(
    prog="python -m data_pipelines.benchmark", description=__doc__.split("\n")[0]
  )
  parser.add_argument("--what", choices=("padding", "planning"), required=True)
  parser.add_argument("--rows", type=int, default=64, help="of a step")
  parser.add_argument("--samples", type=int, default=10_000_000, help="of planning")
  parser.add_argument("--json", action="store_true")
  arguments = parser.parse_args(argv)
  lines = (
    padding(arguments.rows) if arguments.what == "padding" else planning(arguments.rows, arguments.samples)
  )
  for line in lines:
    print(json.dumps(line) if arguments.json else "  ".join(f"{k} {v}" for k, v in line.items()), flush=True)
  return 0


def padding(rows_per_step: int) -> list[dict]:
  """Greedy beside best fit: padding, and by how much the dearest row of a step costs more than the mean."""
  lines = []
  for name, mix in MIXES.items():
    plan = RowPlan(
      draw(mix, _SAMPLES),
      rows_per_step=rows_per_step,
      row_tokens=mix.row_tokens,
      max_samples=mix.max_samples,
      cost=mix.cost,
    )
    stats = plan.stats()
    lines += [
      {
        "mix": name,
        "method": method,
        "padding_percent": round(100 * stats[method]["padding"], 2),
        "dearest_over_mean": round(stats[method]["dearest_over_mean_of_step"], 3),
        "samples_per_row": round(stats[method]["samples_per_row"], 1),
      }
      for method in METHODS
    ]
  return lines


class IndexOnly:
  """Sizes of so many samples, in arrays, and nothing to load: what planning sees of an index."""

  def __init__(self, count: int, seed: int = 0):
    self.name, self.rejects, self._count = f"{count} index entries", [], count
    rng = np.random.default_rng(seed)
    sides = np.array([(480, 854), (720, 1280), (1080, 1920), (854, 480), (768, 768), (512, 640)], np.int32)
    height, width = sides[rng.integers(len(sides), size=count, dtype=np.uint8)].T
    frames = np.where(rng.random(count, np.float32) < 0.2, 1, rng.integers(24, 481, count, dtype=np.int32))
    self._sizes = Sizes(
      frames.astype(np.int32), height, width, np.where(frames > 1, 24, 0).astype(np.float32)
    )

  def __len__(self) -> int:
    return self._count

  def sizes(self) -> Sizes:
    return self._sizes

  def info(self, i: int) -> SampleInfo:
    frames, height, width, fps = (c[i].item() for c in self._sizes)
    return SampleInfo(
      id=i, name=f"{i:010d}", num_frames=frames, height=height, width=width, fps=fps, captions=("",)
    )

  def fingerprint(self) -> str:
    return self.name


def planning(rows_per_step: int, samples: int) -> list[dict]:
  """One line: what a process holds beyond the index itself, and how long rows take to find."""
  config = DataConfig(
    patch=(4, 16, 16), rows=rows_per_step, row_tokens=65_536, row_samples=128, max_frames=96,
    max_tokens=16_384, packing_cost=(24.0 * 1152, 4.0),
  )  # fmt: skip
  source = IndexOnly(samples)
  index_mb, before_mb = sum(c.nbytes for c in source.sizes()) / 2**20, _peak_mb()
  began = time.perf_counter(), time.process_time()
  pipeline = Pipeline(source, config, batch_spec(config), str.split)
  pipeline.plan.rows_of_step(0)
  start_s, start_cpu_s = time.perf_counter() - began[0], time.process_time() - began[1]
  epoch = pipeline.plan.windows_per_epoch * pipeline.plan.rows_per_window // rows_per_step
  in_order = _seconds(pipeline.plan, range(1, 1 + _STEPS))
  anywhere = _seconds(pipeline.plan, np.random.default_rng(1).integers(0, epoch, 20).tolist())
  return [
    {
      "samples": samples,
      "index_mb": round(index_mb, 1),
      "peak_mb_before": round(before_mb, 1),
      "peak_mb": round(_peak_mb(), 1),
      "start_s": round(start_s, 2),
      "start_cpu_s": round(start_cpu_s, 2),
      "steps_per_epoch": epoch,
      "ms_per_step": round(1e3 * in_order, 3),
      "ms_of_a_step_anywhere": round(1e3 * anywhere, 3),
      "padding_percent": round(100 * pipeline.plan.stats(methods=("best_fit",))["best_fit"]["padding"], 2),
    }
  ]


def _seconds(plan: RowPlan, steps: Sequence[int]) -> float:
  """CPU time of finding the rows of one step."""
  began = time.process_time()
  for step in steps:
    plan.rows_of_step(step)
  return (time.process_time() - began) / len(steps)


def _peak_mb() -> float:
  return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / 2**10


if __name__ == "__main__":
  sys.exit(main())
