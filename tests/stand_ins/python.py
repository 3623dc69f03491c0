"""A python3.12 that installs nothing, and whose trainer ends as the scenario says."""

import os
import signal
import sys
import time
from pathlib import Path

from tests.stand_ins import gcloud
from tests.stand_ins.state import STATE, count, options, record, scenario

ENV = ("SORA_JAX_COMMIT", "SORA_JAX_RUN_ID", "SORA_JAX_DISTRIBUTED", "LIBTPU_INIT_ARGS", "PYTHONPATH")


def train(argv: list[str]) -> int:
  """Keeps in the workdir how far it came. Ends: a code, "preempt" (its VM goes), "wait" (for SIGTERM).

  What it records, it does once it hears SIGTERM; an end other than 0 comes once all `hosts` have recorded.
  """
  host = os.environ.get("SORA_JAX_HOST", "pod") + os.environ.get("SLURM_PROCID", "")
  before = count(f"trainer_{host}")
  workdir = Path(options(argv)[1]["workdir"])
  workdir.mkdir(parents=True, exist_ok=True)
  done = workdir / f"steps_{host}"
  resumed = len(done.read_text()) if done.is_file() else 0
  done.write_text("." * (resumed + 10))
  env = {name: os.environ.get(name) for name in ENV}
  ends = scenario("ends", {})
  ends = ends.get(host, ends.get("*", [0]))
  end = ends[min(before, len(ends) - 1)]
  if end == "wait":
    signal.signal(signal.SIGTERM, lambda *_: os._exit(42))
    signal.signal(signal.SIGUSR1, lambda *_: record("traced", [], host=host))
  record("train", argv, host=host, env=env, resumed=resumed, code=Path.cwd().name)
  count(f"recorded_{host}")
  print(f"{host}: resumed from step {resumed}", flush=True)
  while end and len(list((STATE / "counts").glob("recorded_*"))) < scenario("hosts", 1):
    time.sleep(0.02)
  if end == "preempt":
    node = host.rsplit("-w-", 1)[0]
    gcloud.put("nodes", node, state="PREEMPTED", workers=0)
    return 137
  if end == "wait":
    while True:
      time.sleep(0.05)
  if end:
    print(f"error: {host} ends with {end}", flush=True)
  time.sleep(scenario("train_s", 0))
  return end


def main(argv: list[str]) -> int:
  module, rest = argv[1], argv[2:]
  assert argv[0] == "-m", argv
  if module == "sora_jax.train" and "--check_config" in rest:
    record("check", rest)
    print(scenario("check_says", ""), file=sys.stderr)
    return scenario("check_code", 0)
  if module == "sora_jax.train":
    return train(rest)
  if module == "sora_jax.xla_flags":
    print(f"--xla_for={options(rest)[1]['generation']} --xla_other=true")
    return 0
  record("python", argv)
  if module == "venv":
    binary = Path(rest[0], "bin", "python")
    binary.parent.mkdir(parents=True)
    binary.symlink_to(STATE / "bin" / "python3.12")
  return 0


if __name__ == "__main__":
  sys.exit(main(sys.argv[1:]))
