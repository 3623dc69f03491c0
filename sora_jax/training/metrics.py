"""Numbers of a run: console, JSONL, TensorBoard. Their names are the keys of docs/training.md."""

import contextlib
import dataclasses
import json
import math
import time
from collections.abc import Mapping
from pathlib import Path

import jax
import numpy as np
import tensorboardX

from sora_jax.nn import attention_tpu
from sora_jax.nn.attention_tiles import count_live
from sora_jax.parallel import hostlog, multihost
from sora_jax.types import NO_SAMPLE, Sums, TokenBatch


@dataclasses.dataclass(frozen=True)
class HostStats:
  """What the host counts of its own rows."""

  tokens: int  # that belong to a sample
  slots: int  # places for tokens
  samples: int
  unreadable: int
  flops: float
  live_tiles: int  # of self-attention at the TPU kernel's block size
  tiles: int
  rows: int
  dearest_row: float  # FLOPs; 0 where they are not known by row
  counts: Mapping[str, float] = dataclasses.field(
    default_factory=dict
  )  # of the data: the same names every step

  @staticmethod
  def of(
    batch: TokenBatch, flops: float | np.ndarray, counts: Mapping[str, float] | None = None
  ) -> "HostStats":
    """`flops` of the batch, or of each row."""
    blocks = attention_tpu.blocks_for()
    live_tiles, tiles = count_live(batch.segment_BL, blocks.q, blocks.k)
    return HostStats(
      tokens=int((batch.segment_BL > 0).sum()),
      slots=batch.segment_BL.size,
      samples=int((batch.sample_id_BN != NO_SAMPLE).sum()),
      unreadable=int(batch.unreadable_B.sum()),
      flops=float(np.sum(flops)),
      live_tiles=live_tiles,
      tiles=tiles,
      rows=len(batch.segment_BL),
      dearest_row=float(np.max(flops)) if np.ndim(flops) else 0.0,
      counts=counts or {},
    )

  def summed(self) -> np.ndarray:
    """Everything but `counts`."""
    return np.array([getattr(self, name) for name in _SUMMED], np.float64)


_SUMMED = [f.name for f in dataclasses.fields(HostStats) if f.name != "counts"]


def means(sums: Sums, prefix: str = "") -> dict[str, float]:
  """Sums -> means; a mean of nothing is left out."""
  return {prefix + name: float(total) / float(count) for name, (total, count) in sums.items() if count}


def add_sums(a: Sums | None, b: Sums) -> Sums:
  """Sums over more batches, in float64 on the host."""
  b = {name: (np.float64(total), np.float64(count)) for name, (total, count) in b.items()}
  return b if a is None else {name: (a[name][0] + b[name][0], a[name][1] + b[name][1]) for name in b}


class Window:
  """Sums over the steps since the last report."""

  def __init__(self, peak: float | None):
    self.peak = peak
    self.reset()

  def reset(self) -> None:
    self.start, self.wait_s, self.steps, self.sums = time.monotonic(), 0.0, 0, None
    self.grad_norm, self.last, self.stats = 0.0, {}, np.zeros(len(_SUMMED))
    self.counts: dict[str, float] = {}
    self.costs = []  # of each step: dearest row, all rows, number of rows

  @contextlib.contextmanager
  def aside(self):
    """Time spent on what is not training does not count."""
    began = time.monotonic()
    yield
    self.start += time.monotonic() - began

  @contextlib.contextmanager
  def waiting(self):
    began = time.monotonic()
    yield
    self.wait_s += time.monotonic() - began

  def add(self, scalars: dict, stats: HostStats) -> None:
    """`scalars` of the step, on the host."""
    if np.isfinite(scalars["grad_norm"]) and np.isfinite(scalars["sums"]["loss"][0]):
      self.sums = add_sums(self.sums, scalars["sums"])
      self.grad_norm = max(self.grad_norm, float(scalars["grad_norm"]))
    self.last = scalars
    self.stats += stats.summed()
    self.counts = {name: self.counts.get(name, 0) + count for name, count in stats.counts.items()}
    self.costs.append((stats.dearest_row, stats.flops, stats.rows))
    self.steps += 1

  def report(self) -> dict[str, float]:
    """Metrics of the window; a collective."""
    elapsed = max(time.monotonic() - self.start, 1e-9)
    totals = multihost.scalars_over_processes(*self.stats, *self.counts.values(), self.wait_s)
    tokens, slots, samples, unreadable, flops, live_tiles, tiles, *_, wait_s = totals
    out = means(self.sums or {}) | dict(zip(self.counts, totals[len(_SUMMED) :]))
    out |= {
      "grad_norm": self.grad_norm,
      "lr": float(self.last["lr"]),
      "skipped": float(self.last["skipped"]),
      "tokens_per_s": tokens / elapsed,
      "samples_per_s": samples / elapsed,
      "step_s": elapsed / self.steps,
      "padding": 1 - tokens / max(slots, 1),
      "unreadable": unreadable,
      "flops_per_s": flops / elapsed,
      "data_wait": wait_s / jax.process_count() / elapsed,
      "live_tiles": live_tiles / self.steps,
      "live_tile_share": live_tiles / max(tiles, 1),
    }
    costs = multihost.over_processes(np.asarray(self.costs))
    dearest, total, rows = costs[..., 0].max(0), costs[..., 1].sum(0), costs[..., 2].sum(0)
    if (dearest > 0).any():
      out["cost_imbalance"] = float(np.mean((dearest * rows / total)[dearest > 0]))
    if self.peak:
      out["mfu"] = out["flops_per_s"] / self.peak
    self.reset()
    return out


class Writer:
  """Writes scalars and images of process 0; does nothing in the others."""

  def __init__(self, workdir: str | Path, *, num_steps: int, tensorboard: bool = True):
    self.active, self.num_steps = multihost.is_main(), num_steps
    self.started, self.first_step = time.monotonic(), None
    self.jsonl = self.board = None
    if self.active:
      self.jsonl = open_to_append(Path(workdir) / "metrics.jsonl")
      if tensorboard:
        self.board = tensorboardX.SummaryWriter(str(Path(workdir) / "tensorboard"))

  def scalars(self, step: int, values: dict[str, float]) -> None:
    if not self.active:
      return
    # NaN is no JSON.
    clean = {key: (value if math.isfinite(value) else None) for key, value in values.items()}
    try:
      self.jsonl.write(json.dumps({"step": step, **clean}) + "\n")
      self.jsonl.flush()
    except OSError as error:  # a full disk: numbers are lost, the run is not
      hostlog.say(f"metrics of step {step} were not written: {error.strerror}")
    if self.board:
      for key, value in values.items():
        self.board.add_scalar(key, value, step)

  def image(self, step: int, name: str, image_HWC: np.ndarray) -> None:
    if self.active and self.board:
      self.board.add_image(name, image_HWC, step, dataformats="HWC")

  def say(self, text: str) -> None:
    """On the console of process 0, and in the log of every process."""
    hostlog.say(text)

  def progress(self, step: int, values: dict[str, float]) -> None:
    """One line: where the run is, how it goes and how long it will take."""
    if self.first_step is None:
      self.first_step, self.started = step, time.monotonic()
    left = (self.num_steps - step) * values["step_s"]
    done = step / max(self.num_steps, 1)
    bar = "#" * int(20 * done) + "." * (20 - int(20 * done))
    mfu = f" | MFU {values['mfu']:.1%} of bf16 peak" if "mfu" in values else ""
    skipped = f" | skipped {values['skipped']:.0f}" if values["skipped"] else ""
    unreadable = f" | unreadable {values['unreadable']:.0f}" if values["unreadable"] else ""
    self.say(
      f"[{bar}] {step}/{self.num_steps} loss {values.get('loss', math.nan):.4f} | "
      f"grad {values['grad_norm']:.2f} | lr {values['lr']:.2e} | "
      f"{si(values['tokens_per_s'])}tok/s | {si(values['flops_per_s'])}FLOP/s{mfu} | "
      f"pad {values['padding']:.1%} | data wait {values['data_wait']:.0%}{skipped}{unreadable} | "
      f"left {duration(left)}"
    )

  def close(self) -> None:
    for file in (self.jsonl, self.board):
      if file:
        with contextlib.suppress(OSError):  # a full disk
          file.close()


def open_to_append(path: Path):
  """For lines; one that a killed run left half written is cut off."""
  if path.exists() and (text := path.read_bytes()) and not text.endswith(b"\n"):
    with path.open("r+b") as file:
      file.truncate(text.rfind(b"\n") + 1)
  return path.open("a")


def si(value: float) -> str:
  """1234567 -> "1.23 M"."""
  for unit in ("", "k", "M", "G", "T", "P", "E"):
    if abs(value) < 1000 or unit == "E":
      return f"{value:.3g} {unit}" if unit else f"{value:.3g} "
    value /= 1000
  raise AssertionError


def duration(seconds: float) -> str:
  seconds = int(seconds)
  hours, minutes = seconds // 3600, seconds // 60 % 60
  return f"{hours}h{minutes:02d}m" if hours else f"{minutes}m{seconds % 60:02d}s"
