"""One process of a run that faults are done to: --workdir=DIR --settings=JSON, cluster from the environment.

It ends as sora_jax.train does, through sora_jax.cli. Steps are slow enough for a test to act between them.
"""

import json
import os
import signal
import time

import jax
import numpy as np
from absl import flags

from sora_jax import cli
from sora_jax.parallel import agreement, cluster, exits, hostlog
from sora_jax.parallel.mesh import MeshConfig, local_rows, make_mesh
from sora_jax.parallel.rules import Rules
from sora_jax.parallel.sentinel import Sentinel
from sora_jax.training.loop import TrainConfig, fit
from sora_jax.training.optimizer import OptimizerConfig
from tests import tiny_dit, toy

WORKDIR = flags.DEFINE_string("workdir", None, "folder of the run")
SETTINGS = flags.DEFINE_string("settings", "{}", "see main")
DEFAULTS = {
  "task": "toy",
  "steps": 12,
  "slow_s": 0.1,
  "meshes": {"": {}},  # name -> MeshConfig; each is a run of its own, in WORKDIR/name
  "train": {},  # TrainConfig
  "nan": [],  # batch numbers without a number in them
  "scale": {},  # batch number -> factor of its tokens
  "hang": {},  # process -> batch number at which its data never come
  "stop_before_join": {},  # process -> signal it sends itself before the first compilation
}


def main(argv):
  settings = DEFAULTS | json.loads(SETTINGS.value)
  cluster.join(cluster.find(os.environ))
  listener = Sentinel().start()
  agreement.check(agreement.facts({"steps": settings["steps"]}))
  index, code = jax.process_index(), exits.DONE
  for name, sizes in settings["meshes"].items():
    mesh = make_mesh(MeshConfig(**{"fsdp": -1} | sizes))
    code = run(settings, os.path.join(WORKDIR.value, name), mesh, index, listener)
  return code


def run(settings, workdir, mesh, index, listener):
  module = {"toy": toy, "dit": tiny_dit}[settings["task"]]
  rows = local_rows(mesh, module.SPEC.rows)
  os.makedirs(workdir, exist_ok=True)
  hostlog.open_in(workdir, index)

  def batches(start):
    for number, batch in enumerate(module.batches(start), start):
      time.sleep(settings["slow_s"])
      if settings["hang"].get(str(index)) == number:
        time.sleep(100_000)
      if number in settings["nan"]:
        batch.tokens_BLC[:] = np.nan
      batch.tokens_BLC[:] *= settings["scale"].get(str(number), 1)
      yield jax.tree.map(lambda x: x[rows], batch)

  if number := settings["stop_before_join"].get(str(index)):
    os.kill(os.getpid(), getattr(signal, number))
    time.sleep(5)  # as long compilation would, of which the sentinel takes no notice
  result = fit(
    module.task(),
    config=TrainConfig(
      num_steps=settings["steps"],
      **{"log_every": 1, "save_every": 3, "keep": 3, "tensorboard": False} | settings["train"],
    ),
    optimizer=OptimizerConfig(lr=1e-2, warmup_steps=2),
    mesh=mesh,
    train_batches=batches,
    workdir=workdir,
    resolved_config={},
    rules=Rules(small=0),
    listener=listener,
  )
  return exits.PREEMPTED if result.preempted else exits.DONE


if __name__ == "__main__":
  cli.run(main)
