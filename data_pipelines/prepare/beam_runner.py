"""The same tasks on Apache Beam: DirectRunner, Flink, Dataflow. All must see the output folder."""

import functools
import logging
import threading
from collections.abc import Sequence

from data_pipelines.prepare.tasks import Job, Task
from data_pipelines.prepare.worker import Worker, supervise

try:
  import apache_beam as beam
  from apache_beam.options.pipeline_options import PipelineOptions
except ImportError:  # the extra `beam`
  beam = None

_own = threading.local()  # a worker process per thread of Beam's, as locally


def require() -> None:
  if beam is None:
    raise ValueError(
      "--runner=beam needs Apache Beam: pip install 'sora_jax[beam]', best in an environment of its own, "
      "for it holds back protobuf, pyarrow and pillow"
    )


def run(todo: Sequence[Task], job: Job, *, limit_s: float, label: str, arguments: Sequence[str]) -> None:
  """Sees every task through; Beam tries again what fails by its own rules."""
  require()
  logging.info("%s: %d tasks on Beam", label, len(todo))
  with beam.Pipeline(options=PipelineOptions(list(arguments))) as pipeline:
    _ = (
      pipeline
      | "tasks" >> beam.Create(list(todo), reshuffle=True)
      | "run" >> beam.Map(functools.partial(_run, job=job, limit_s=limit_s))
    )


def _run(task: Task, job: Job, limit_s: float) -> None:
  if getattr(_own, "job", None) is not job:
    if hasattr(_own, "worker"):
      _own.worker.close()
    _own.worker, _own.job = Worker(job, limit_s), job
  supervise(_own.worker, task, job, lambda sample: None)
