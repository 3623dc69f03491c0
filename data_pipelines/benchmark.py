"""python -m data_pipelines.benchmark --what=padding: what packing wastes, by mix of sizes.

Prints one JSON object a line with --json.
"""

import argparse
import json
import sys
from collections.abc import Sequence

from data_pipelines.mixes import MIXES, draw
from sora_jax.packing.plan import METHODS, RowPlan

_SAMPLES = 200_000


def main(argv: Sequence[str] | None = None) -> int:
  parser = argparse.ArgumentParser(
    prog="python -m data_pipelines.benchmark", description=__doc__.split("\n")[0]
  )
  parser.add_argument("--what", choices=("padding",), required=True)
  parser.add_argument("--rows", type=int, default=64, help="of a step")
  parser.add_argument("--json", action="store_true")
  arguments = parser.parse_args(argv)
  for line in padding(arguments.rows):
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


if __name__ == "__main__":
  sys.exit(main())
