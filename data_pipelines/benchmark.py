"""python -m data_pipelines.benchmark --what=WHAT [--source=PATH ...] [--json]: what feeding a run costs.

padding   by mix of sizes: what packing wastes, how unlike the rows of a step are, and real tokens for the
          same compute beside buckets and plain padding
planning  memory and time of the plan of --samples=10000000 samples, at steps anywhere in the run
index     opening the index of a prepared set of --samples: held in memory, or mapped
decode    reading --source (and the other keys of config.data): against a plain PyAV loop and a pool of
          processes, interleaved in one run
latents   reading prepared latents of --source
"""

import json
import resource
import sys
import time
from collections.abc import Sequence

import numpy as np

from data_pipelines import benchmark_index, benchmark_packing, benchmark_reading
from data_pipelines.cli import add_arguments, new_parser, parse
from data_pipelines.pipeline import DataConfig, Pipeline, batch_spec
from data_pipelines.sources.base import SampleInfo, Sizes
from sora_jax.packing.plan import RowPlan

_STEPS = 200


def main(argv: Sequence[str] | None = None) -> int:
  parser = new_parser("benchmark", __doc__)
  parser.add_argument("--what", choices=("padding", "planning", "index", "decode", "latents"), required=True)
  parser.add_argument("--samples", type=int, default=10_000_000, help="of planning and index")
  parser.add_argument("--clips", type=int, default=48, help="read in a round of decode or latents")
  parser.add_argument("--repeats", type=int, default=3, help="rounds")
  parser.add_argument("--json", action="store_true", help="print a JSON object a line")
  add_arguments(parser)
  arguments = parse(parser, argv)
  own = {key: arguments.pop(key) for key in ("what", "samples", "clips", "repeats", "json")}
  try:
    config = DataConfig(**arguments)
    if own["what"] == "padding":
      lines = benchmark_packing.padding(config.rows)
    elif own["what"] == "planning":
      lines = planning(config.rows, own["samples"])
    elif own["what"] == "index":
      lines = benchmark_index.index(own["samples"])
    elif own["what"] == "latents":
      lines = benchmark_reading.latents(config, own["clips"], own["repeats"])
    else:
      lines = benchmark_reading.decode(config, own["clips"], own["repeats"])
  except ValueError as e:
    print(f"error: {e}", file=sys.stderr)
    return 2
  for line in lines:
    print(json.dumps(line) if own["json"] else "  ".join(f"{k} {v}" for k, v in line.items()), flush=True)
  return 0


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
