"""sbatch runs the script at once, srun its tasks, `scontrol requeue` has sbatch run the script once more."""

import os
import shutil
import signal
import subprocess
import sys

from tests.stand_ins.state import STATE, fail, options, record, scenario

JOB = "4711"


def sbatch(argv: list[str]) -> None:
  script = next(i for i, arg in enumerate(argv) if not arg.startswith("--"))
  flags = options(argv[:script])[1]
  if error := scenario("sbatch_error"):
    fail(error)
  print(JOB, flush=True)
  spool = STATE / "spool"
  shutil.copy(argv[script], spool)  # as SLURM does: a script must not look beside itself
  for start in range(scenario("max_starts", 9)):
    (STATE / "requeued").unlink(missing_ok=True)
    env = {k: v for k, v in os.environ.items() if k != "PYTHONPATH"} | {
      "SLURM_JOB_ID": JOB, "SLURM_JOB_NODELIST": "n[0-1]", "SLURM_NTASKS_PER_NODE": flags["ntasks-per-node"],
      "SLURM_JOB_NUM_NODES": flags["nodes"],
    }  # fmt: skip
    if start:
      env["SLURM_RESTART_COUNT"] = str(start)
    with open(flags["output"], "a") as log:
      job = subprocess.Popen(["bash", spool, *argv[script + 1 :]], env=env, stdout=log, stderr=log)
      (STATE / "job_pid").write_text(str(job.pid))
      (STATE / "job_code").write_text(str(job.wait()))
    if not (STATE / "requeued").exists():
      break


def srun(argv: list[str]) -> None:
  words = argv[next(i for i, arg in enumerate(argv) if not arg.startswith("--")) :]
  per_node = int(os.environ["SLURM_NTASKS_PER_NODE"])
  running = []
  signal.signal(signal.SIGTERM, lambda *_: [process.terminate() for process in running])
  for rank in range(per_node * int(os.environ["SLURM_JOB_NUM_NODES"])):
    env = {k: v for k, v in os.environ.items() if k != "PYTHONPATH"}
    env |= {"SLURM_PROCID": str(rank), "SORA_JAX_HOST": f"n{rank // per_node}"}
    running.append(subprocess.Popen(words, env=env))
  sys.exit(max(process.wait() % 256 for process in running))


def main(argv: list[str]) -> None:
  tool = os.environ["TOOL"]
  record(tool, argv)
  if tool == "sbatch":
    sbatch(argv)
  elif tool == "srun":
    srun(argv)
  else:
    assert argv == ["requeue", JOB]
    (STATE / "requeued").touch()


if __name__ == "__main__":
  main(sys.argv[1:])
