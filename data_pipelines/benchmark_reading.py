"""Reading against simpler readers of the same clips, interleaved: loads of the machine hit all alike."""

import concurrent.futures
import dataclasses
import itertools
import multiprocessing
import os
import statistics
import time
from collections.abc import Callable

import av
import numpy as np
from av.video.reformatter import Interpolation
from PIL import Image

from data_pipelines.pipeline import DataConfig, Pipeline, batch_spec, build_source
from data_pipelines.sources.files import FileSource
from data_pipelines.texts import reader
from sora_jax.packing.geometry import ClipSpec

_source: FileSource | None = None  # in a process of the pool


@dataclasses.dataclass(frozen=True)
class Job:
  """A clip as both readers read it: from its start."""

  path: str
  spec: ClipSpec
  native_fps: float


def decode(config: DataConfig, clips: int, repeats: int) -> list[dict]:
  config = dataclasses.replace(config, random_start=False, cache_mb=0, num_eval=0, eval_fraction=0.0)
  source = build_source(config)
  if not isinstance(source, FileSource):
    raise ValueError(f"{source.name} is no set of media files: decode compares readers of files")
  pipeline = Pipeline(source, config, batch_spec(config), reader(config, str.split), split="all")
  plain = [
    i for i in pipeline.infos if not (source.entry(i).frames or source.entry(i).span or source.entry(i).crop)
  ]
  if not plain:
    raise ValueError(f"{source.name} has no plain files")
  chosen = [plain[k] for k in np.linspace(0, len(plain) - 1, min(clips, len(plain))).astype(int)]
  jobs = [Job(source.entry(i).path, pipeline.specs[i], pipeline.infos[i].fps) for i in chosen]
  names = ("ours", "pyav", "ours_threads", "ours_workers", "pool", "ours_threads_cpu", "pool_cpu")
  seconds = {name: [] for name in names}
  processes = os.cpu_count() or 1
  with concurrent.futures.ProcessPoolExecutor(
    processes, multiprocessing.get_context("spawn"), initializer=_keep, initargs=(source,)
  ) as pool:
    list(pool.map(plain_read, jobs[: 2 * processes]))  # started and warm
    list(pool.map(_kept_read, chosen[: 2 * processes], jobs))
    for _ in range(repeats):
      seconds["pyav"].append(_cpu_s(lambda: [plain_read(job) for job in jobs]))
      seconds["ours"].append(_cpu_s(lambda: [source.load(i, job.spec) for i, job in zip(chosen, jobs)]))
      began = time.perf_counter()
      seconds["pool_cpu"].append(sum(pool.map(_cpu_of_plain_read, jobs)))
      seconds["pool"].append(time.perf_counter() - began)
      began = time.perf_counter()
      list(pool.map(_kept_read, chosen, jobs))
      seconds["ours_workers"].append(time.perf_counter() - began)
      began = time.perf_counter()
      seconds["ours_threads_cpu"].append(_cpu_s(lambda: _threaded(source, chosen, jobs, processes)))
      seconds["ours_threads"].append(time.perf_counter() - began)
  best = {name: min(values) for name, values in seconds.items()}
  return [
    {
      "clips": len(jobs),
      "frames": sum(job.spec.num_frames for job in jobs),
      "ours_cpu_s": round(best["ours"], 3),
      "plain_pyav_cpu_s": round(best["pyav"], 3),
      "ours_over_plain_per_core": round(_ratio(seconds["pyav"], seconds["ours"]), 3),
      "processes": processes,
      "ours_wall_s": round(best["ours_threads"], 3),
      "process_pool_wall_s": round(best["pool"], 3),
      "ours_in_workers_wall_s": round(best["ours_workers"], 3),
      "ours_in_workers_over_process_pool": round(_ratio(seconds["pool"], seconds["ours_workers"]), 3),
      "ours_over_process_pool": round(_ratio(seconds["pool"], seconds["ours_threads"]), 3),
      "ours_over_process_pool_by_cpu": round(_ratio(seconds["pool_cpu"], seconds["ours_threads_cpu"]), 3),
    }
  ]


def latents(config: DataConfig, clips: int, repeats: int) -> list[dict]:
  """Of `config.latents`: rate of reading whole samples, of one core by CPU time, and of loaded batches."""
  pipeline = Pipeline(build_source(config), config, batch_spec(config), reader(config, _words), split="all")
  source = pipeline.source
  if not config.latents:
    raise ValueError("latents wants data.latents (the hash of their encoder) and data.latent_channels")
  chosen = [list(pipeline.infos)[k] for k in np.linspace(0, len(pipeline.infos) - 1, clips).astype(int)]
  size, cpu, wall = 0, [], []
  for _ in range(repeats):
    size = 0
    began, began_cpu = time.perf_counter(), time.process_time()
    for i in chosen:
      size += source.load(i, pipeline.specs[i]).nbytes
    cpu.append(time.process_time() - began_cpu)
    wall.append(time.perf_counter() - began)
  batches = pipeline.batches()
  next(batches)
  began = time.process_time()
  tokens = sum(int((b.segment_BL > 0).sum()) for b in itertools.islice(batches, 10))
  batch_s = time.process_time() - began
  batches.close()
  return [
    {
      "samples": len(chosen),
      "mb": round(size / 2**20, 1),
      "gb_per_cpu_s": round(size / min(cpu) / 1e9, 3),
      "gb_per_wall_s": round(size / min(wall) / 1e9, 3),
      "tokens_in_batches_per_cpu_s": round(tokens / batch_s),
    }
  ]


def _words(text: str) -> list[int]:
  return [1] * len(text.split())


def plain_read(job: Job) -> np.ndarray:
  """What a first loop with PyAV does: decode, take every n-th frame, resize; no care for odd files. By one
  thread, as ours: PyAV by itself scales each frame with several, at more CPU, and on a busy machine
  those take time from others."""
  spec = job.spec
  if job.native_fps == 0:
    with Image.open(job.path) as image:
      return np.asarray(image.convert("RGB").resize((spec.width, spec.height), Image.Resampling.BICUBIC))[
        None
      ]
  wanted = [int(k * job.native_fps / spec.fps + 1e-3) if spec.fps else 0 for k in range(spec.num_frames)]
  clip = np.empty((spec.num_frames, spec.height, spec.width, 3), np.uint8)
  filled = 0
  with av.open(job.path) as container:
    stream = container.streams.video[0]
    stream.codec_context.thread_count = 1
    for n, frame in enumerate(container.decode(stream)):
      if n == wanted[filled]:
        how = Interpolation.AREA if spec.height < frame.height else Interpolation.BICUBIC
        clip[filled] = frame.to_ndarray(
          format="rgb24", width=spec.width, height=spec.height, interpolation=how, threads=1
        )
        filled += 1
        if filled == spec.num_frames:
          break
  return clip


def _threaded(source: FileSource, chosen: list[int], jobs: list[Job], threads: int) -> None:
  with concurrent.futures.ThreadPoolExecutor(threads) as pool:
    list(pool.map(lambda pair: source.load(pair[0], pair[1].spec), zip(chosen, jobs)))


def _keep(source: FileSource) -> None:
  global _source
  _source = source


def _kept_read(i: int, job: Job) -> None:
  """As `data.workers` reads: in a process that holds the source, the clip stays there."""
  _source.load(i, job.spec)


def _cpu_s(run: Callable) -> float:
  began = time.process_time()
  run()
  return time.process_time() - began


def _cpu_of_plain_read(job: Job) -> float:
  """In a process of the pool; the clip stays there, which flatters it."""
  began = time.process_time()
  plain_read(job)
  return time.process_time() - began


def _ratio(theirs: list[float], ours: list[float]) -> float:
  """Above 1: ours is faster; the median over rounds."""
  return statistics.median(t / o for t, o in zip(theirs, ours))
