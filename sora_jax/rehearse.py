"""python -m sora_jax.rehearse --config=configs/NAME.py --topology=v5p:8x8x8 [--num_slices=N] [--json=FILE]

Compiles the step that sora_jax.train would run on a TPU slice, or with --topology=h200:8x8 on 8 hosts of 8
GPUs, without one, and says whether it fits, what it moves and what it may cost. --mode=sample: the sampler's
program. Without --topology: those of the config. --all: every configs/t2v_*.py on all of its topologies,
--jobs of them at a time. --check_golden, --write_golden: what must not change unseen, in
tests/golden/rehearse. Exit code: 0 all fit, 1 one does not, or a lint or comparison fails.
"""

import dataclasses
import importlib.util
import json
import os
import sys
import time
from pathlib import Path

import jax
import ml_collections
from absl import flags
from ml_collections import config_flags

from data_pipelines.config import DataConfig, batch_spec
from sora_jax import cli
from sora_jax.rehearsal import report, topology
from sora_jax.rehearsal.jobs import Job, cores, rehearse_all
from sora_jax.rehearsal.run import EFFORTS, FAST, RehearseConfig
from sora_jax.tasks import registry

FLAGS = flags.FLAGS
ROOT = Path(__file__).resolve().parent.parent
GOLDEN = ROOT / "tests" / "golden" / "rehearse"


def define_flags() -> None:
  config_flags.DEFINE_config_file("config", None, "FILE.py or FILE.py:PRESET, with a get_config(preset).")
  flags.DEFINE_string(
    "topology",
    "",
    "GENERATION:AxB[xC], as v5p:8x8x8, or of GPUs GENERATION:HOSTSxGPUS, as h200:8x8; empty: the config's.",
  )
  flags.DEFINE_integer("num_slices", 0, "Slices of that topology; 0 = 1, or what follows a * in its name.")
  flags.DEFINE_enum("mode", "train", ["train", "sample"], "Which program.")
  flags.DEFINE_string("json", "", "File for the figures: an object, or a list of several.")
  flags.DEFINE_string("hlo", "", "File for the text of the compiled module, of the last program.")
  flags.DEFINE_bool("all", False, "Every configs/t2v_*.py on the topologies it names.")
  flags.DEFINE_integer("jobs", 0, "Programs compiled at a time; 0 = as many as cores.", lower_bound=0)
  flags.DEFINE_enum("effort", FAST, list(EFFORTS), "Of the compiler on speed; the least compiles fastest.")
  flags.DEFINE_bool("check_golden", False, "Fail where figures differ from tests/golden/rehearse.")
  flags.DEFINE_bool("write_golden", False, "Write those files anew.")


def main(argv: list[str]) -> int:
  del argv
  jax.config.update("jax_platforms", "cpu")  # nothing runs; a TPU that is there stays free
  began, jobs, names = time.monotonic(), [], []
  for name, config in _configs():
    data = registry.section(DataConfig, config, "data")
    named = registry.section(RehearseConfig, config, "rehearse").topologies
    wanted = [FLAGS.topology] if FLAGS.topology else named
    if not wanted:
      raise ValueError(f"{name} names no topology in config.rehearse.topologies; give --topology=v5p:8x8x8")
    for at in (topology.parse(t, FLAGS.num_slices) for t in wanted):
      jobs.append(
        Job(
          name=name, config=config.to_dict(), spec=batch_spec(data), patch=data.patch, at=at, mode=FLAGS.mode,
          effort=FLAGS.effort,
        )
      )  # fmt: skip
      names.append(f"{Path(name.split(':')[0]).stem}_{at.key}_{FLAGS.mode}.json")
  jobs[-1] = dataclasses.replace(jobs[-1], hlo_file=FLAGS.hlo)
  results, failed = [], False
  for result, golden in zip(rehearse_all(jobs, processes=FLAGS.jobs or cores()), names):
    results.append(result)
    print(report.table(result) if "times" in result else report.refusal(result), end="\n\n", flush=True)
    failed |= not result["fits"]
    failed |= not _golden(result, golden)
  if len(jobs) > 1:
    print(f"{len(jobs)} programs in {time.monotonic() - began:.0f} s")
  if FLAGS.json:
    text = json.dumps(results[0] if len(results) == 1 else results, indent=1)
    Path(FLAGS.json).write_text(text + "\n")
  return int(failed)


def _configs() -> list[tuple[str, ml_collections.ConfigDict]]:
  if not FLAGS.all:
    if FLAGS.config is None:
      raise ValueError("--config=FILE.py or --all is needed")
    given = next((a.split("=", 1)[1] for a in sys.argv if a.startswith("--config=")), "config")
    return [(os.path.relpath(given) if given.startswith("/") else given, FLAGS.config)]
  found = []
  for path in sorted((ROOT / "configs").glob("t2v_*.py")):
    spec = importlib.util.spec_from_file_location(path.stem, path)
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    for preset in getattr(module, "PODS", ("",)):
      name = f"configs/{path.name}" + (f":{preset}" if preset else "")
      found.append((name, module.get_config(preset)))
  return found


def _golden(result: dict, name: str) -> bool:
  """Whether the figures are those of the golden file, which is written or compared where asked."""
  if "times" not in result or not (FLAGS.write_golden or FLAGS.check_golden):
    return True
  path = GOLDEN / name
  if FLAGS.write_golden:
    report.write_golden(path, result)
    return True
  differences = report.compare_golden(path, result)
  if differences is None:
    print(f"note: {name} is of other versions or another effort; not compared", file=sys.stderr)
  for line in differences or []:
    print(f"golden {name}: {line}", file=sys.stderr)
  return not differences


if __name__ == "__main__":
  define_flags()
  cli.run(main)
