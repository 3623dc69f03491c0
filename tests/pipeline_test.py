import collections
import contextlib
import dataclasses
import itertools
import json
import logging
import re

import numpy as np
import pytest

from data_pipelines import report as report_main
from data_pipelines import sizes
from data_pipelines.loader import ClipCache, Planned, total_frames
from data_pipelines.parts import UNREACHABLE, OutageError
from data_pipelines.pipeline import DataConfig, Pipeline, batch_spec, build_source, chosen_ids
from data_pipelines.sources.base import UnreadableError
from data_pipelines.sources.synthetic import SyntheticSource
from sora_jax import cli
from sora_jax.packing.geometry import unpatchify
from sora_jax.packing.pack import stack_rows
from tests import media
from tests.batches import assert_same, ids_of, take

CONFIG = DataConfig(
  num_samples=30,
  patch=(2, 8, 8),
  rows=3,
  row_tokens=96,
  max_tokens=48,
  row_samples=6,
  row_text_tokens=64,
  prefetch=1,
)


def tokenize(text: str) -> list[int]:  # at the top of the module, so that worker processes find it
  return [2, *text.encode()[:7]]


class Flaky:
  """Synthetic samples of which one in so many cannot be read."""

  def __init__(self, num_samples: int, one_in: int = 5):
    self._source, self._one_in = SyntheticSource(num_samples), one_in
    self.name, self.rejects, self.info, self.why = "flaky", [], self._source.info, "gone"

  def __len__(self):
    return len(self._source)

  def load(self, i, spec, start_s=0.0):
    if i % self._one_in == 0:
      raise UnreadableError(self.why, f"sample {i}")
    return self._source.load(i, spec, start_s)


def make(reader=None, *, split="train", **changes) -> Pipeline:
  config = dataclasses.replace(CONFIG, **changes)
  return Pipeline(reader or build_source(config), config, batch_spec(config), tokenize, split=split)


def test_batches_have_the_shapes_of_the_spec_and_pixels_in_range():
  pipeline = make()
  batch = take(pipeline, 1)[0]
  for name, zeros in vars(pipeline.spec.zeros()).items():
    if zeros is not None:  # embeddings, of text that is ids
      assert getattr(batch, name).shape == zeros.shape and getattr(batch, name).dtype == zeros.dtype, name
  real = batch.tokens_BLC[batch.segment_BL > 0]
  assert -1 <= real.min() < real.max() <= 1
  assert not batch.tokens_BLC[batch.segment_BL == 0].any()


def test_tokens_are_the_pixels_of_the_sample():
  pipeline = make()
  batch = take(pipeline, 1)[0]
  first = batch.segment_BL[0] == 1
  i, grid = int(batch.sample_id_BN[0, 0]), tuple(batch.grid_BN3[0, 0].tolist())
  video = unpatchify(batch.tokens_BLC[0][first], grid, CONFIG.patch)
  spec = pipeline.specs[i]
  expected = pipeline.source.load(i, spec)
  np.testing.assert_array_equal(np.round((video[: spec.num_frames] + 1) * 127.5), expected)
  if spec.num_frames == 1:  # an image fills its temporal patch with itself
    np.testing.assert_array_equal(video[0], video[1])


def test_an_epoch_holds_every_sample_once_and_every_token_is_accounted_for():
  pipeline = make(rows=1)
  num_rows = len(pipeline.plan.rows_of_epoch(0))
  batches = take(pipeline, num_rows)
  assert sorted(i for b in batches for i in ids_of(b)) == list(range(30))
  real = sum(int((b.segment_BL > 0).sum()) for b in batches)
  assert real == pipeline.lengths.sum()
  padding = sum(int((b.segment_BL == 0).sum()) for b in batches)
  assert padding / (num_rows * 96) == pytest.approx(pipeline.plan.stats()["best_fit"]["padding"])


@pytest.mark.parametrize(
  "changes", [{"threads": 0}, {"threads": 1, "prefetch": 3}, {"threads": 7, "cache_mb": 0}]
)
def test_resuming_gives_the_identical_continuation(changes):
  whole = take(make(given_probability=0.5), 30)  # three epochs and more
  for start in (0, 7, 22):
    for a, b in zip(whole[start:], take(make(given_probability=0.5, **changes), 5, start)):
      assert_same(a, b)


def test_worker_processes_give_the_same_batches():
  whole = take(make(), 8)
  for a, b in zip(whole[3:], take(make(workers=2, threads=1), 5, 3)):
    assert_same(a, b)


@pytest.mark.parametrize("hosts", [[slice(0, 1), slice(1, 3)], [slice(0, 1), slice(1, 2), slice(2, 3)]])
def test_slices_of_hosts_make_up_the_batch(hosts):
  parts = [take(make(), 3, 4, rows) for rows in hosts]
  for whole, *pieces in zip(take(make(), 3, 4), *parts):
    assert_same(whole, stack_rows(pieces))


def test_a_sample_that_cannot_be_read_becomes_counted_padding(caplog):
  source, sound = Flaky(30), SyntheticSource(30)
  with caplog.at_level(logging.WARNING):
    pipeline = make(source, rows=1)
    num_rows = len(pipeline.plan.rows_of_epoch(0))
    broken = take(pipeline, 2 * num_rows)
  whole = take(make(sound, rows=1), 2 * num_rows)
  assert sum(int(b.unreadable_B.sum()) for b in broken) == 2 * 6
  for a, b in zip(whole, broken):  # the plan does not shift
    assert [i for i in ids_of(a) if i % 5] == ids_of(b)
  assert sorted(pipeline.loader.failed) == [f"synthetic-{i:06d}" for i in range(0, 30, 5)]
  told = [r.message for r in caplog.records if "cannot be read" in r.message]
  assert len(told) == 6 and "gone: sample" in told[0]  # once each


@pytest.mark.parametrize("workers", [0, 2])
def test_nothing_is_learned_from_padding_alone(workers):
  with pytest.raises(
    ValueError, match="flaky: .. of the last .. samples could not be read, as .*: gone: "
  ) as e:
    take(make(Flaky(30, one_in=1), workers=workers), 40)
  assert "\n" not in str(e.value)
  assert len(take(make(Flaky(30, one_in=3)), 60)) == 60  # a third


def test_an_outage_is_not_the_fault_of_the_data(monkeypatch, capsys):
  """Data that cannot be reached ends a run with the code that a launcher starts again."""
  source = Flaky(30, one_in=1)
  monkeypatch.setattr(source, "why", UNREACHABLE)
  ended = []
  monkeypatch.setattr(cli.os, "_exit", ended.append)
  with pytest.raises(OutageError, match="flaky: .* could not be read, as .*: unreachable: sample") as e:
    take(make(source, workers=1), 40)

  def main(argv):
    raise e.value

  with contextlib.suppress(SystemExit):
    ended.append(cli._guarded(main, []))
  assert ended[0] == 43 and "unreachable" in capsys.readouterr().err


def test_held_out_samples_are_apart_and_stay_so():
  source = SyntheticSource(200)
  sides = {s: set(make(source, split=s, eval_fraction=0.2).infos) for s in ("train", "eval", "all")}
  assert not sides["train"] & sides["eval"] and sides["train"] | sides["eval"] == sides["all"]
  assert 20 < len(sides["eval"]) < 60
  few, config = SyntheticSource(100), dataclasses.replace(CONFIG, eval_fraction=0.2)
  assert set(chosen_ids(few, config, "eval").tolist()) == {i for i in sides["eval"] if i < 100}
  assert len(make(source, split="eval", num_eval=7)) == 7
  with pytest.raises(ValueError, match="num_eval=200 leaves none of 200"):
    make(source, num_eval=200)
  with pytest.raises(ValueError, match="the eval split has no sample"):
    make(source, split="eval")


def test_a_pass_over_held_out_samples_is_complete_and_repeats():
  first, again = (make(split="eval", num_eval=11, given_probability=1.0).epoch_batches() for _ in range(2))
  assert sorted(i for b in first for i in ids_of(b)) == sorted(make(split="eval", num_eval=11).infos)
  assert {len(b.segment_BL) for b in first} == {3} and not any(b.given_BL.any() for b in first)
  for a, b in zip(first, again):
    assert_same(a, b)
  halves = [make(split="eval", num_eval=11).epoch_batches(rows) for rows in (slice(0, 2), slice(2, 3))]
  assert_same(first[0], stack_rows([halves[0][0], halves[1][0]]))


def test_prompts_are_first_frames_never_all_and_none_of_an_image():
  batches = take(make(given_probability=0.7, given_image_share=0.5), 40)
  counts = collections.Counter()
  for batch in batches:
    for b, n in itertools.product(range(3), range(6)):
      t, h, w = batch.grid_BN3[b, n].tolist()
      given = batch.given_BL[b][batch.segment_BL[b] == n + 1]
      frames, rest = divmod(int(given.sum()), h * w) if t else (0, 0)
      assert rest == 0 and given[: frames * h * w].all()
      if t > 1:
        assert frames <= t // 2
        counts[frames] += 1
      elif t:
        assert frames == 0
  assert 0.6 < 1 - counts[0] / counts.total() < 0.8 and counts[1] > counts[2] > 0
  assert not any(b.given_BL.any() for b in take(make(), 3))


def test_captions_and_what_is_cut_of_them(capsys):
  row = take(make(rows=1, row_text_tokens=10), 1)[0]
  assert (row.text_segment_BM > 0).sum() == 10
  assert set(row.text_segment_BM[0]) == set(range(1, len(ids_of(row)) + 1))  # each keeps a share
  cut = make(row_text_tokens=10).report()
  assert cut.text_tokens == 8 * 30 and cut.text_tokens_cut > 0 and cut.captions_cut > 0
  assert make(row_text_tokens=64).report().text_tokens_cut == 0


def planned(pipeline, i, epoch):
  return Planned(epoch, pipeline.source.info(i), pipeline.specs[i], 0, 0)


@pytest.fixture
def clips(tmp_path):
  for i, n in enumerate((26, 12, 5)):
    media.make_clip(tmp_path / f"{i}.mp4", n)
    (tmp_path / f"{i}.txt").write_text(f"clip {i}")
  return tmp_path


def test_long_clips_start_anywhere_and_the_memory_changes_nothing(clips):
  changes = {"source": str(clips), "max_frames": 4, "row_tokens": 200, "max_tokens": 96}
  cached, fresh = make(**changes), make(**changes, cache_mb=0)
  starts = {cached.loader._start(planned(cached, 0, epoch)) for epoch in range(60)}
  assert len(starts) > 12 and max(starts) <= 22 and min(starts) >= 0
  for a, b in zip(take(cached, 6), take(fresh, 6)):
    assert_same(a, b)
  assert cached.loader.cache.hits > 0 and len(cached.loader.cache) == 3 and not len(fresh.loader.cache)
  assert total_frames(cached.infos[0], cached.specs[0]) == 26
  still = make(**changes, random_start=False)
  assert still.loader._start(planned(still, 0, 5)) == 0


def test_the_memory_keeps_to_its_budget():
  cache = ClipCache(100)
  cache.put(1, np.zeros(60, np.uint8))
  cache.put(2, np.zeros(60, np.uint8))
  assert cache.get(1) is not None and cache.get(2) is None and cache.used == 60
  assert not cache.has_room(7)  # a sixteenth at most


def test_a_report_says_what_would_pad_less():
  wasteful = {"row_tokens": 80, "max_tokens": 80}
  report = make(**wasteful).report()
  padding = report.packing["best_fit"]["padding"]
  assert padding > sizes.MUCH_PADDING and f"padding     {report.remedies[0]}" in str(report)
  for told in report.remedies:
    promised = float(re.match(r"about ([\d.]+) %", told)[1]) / 100
    keys = re.findall(r"data\.(\w+)=([\d.]+)", told)
    changes = {key: float(value) if "." in value else int(value) for key, value in keys}
    better = make(**wasteful | changes).report()
    assert better.packing["best_fit"]["padding"] == pytest.approx(promised, abs=1e-3) and promised < padding
  assert report.remedies and not make(max_tokens=96).report().remedies  # 1.3 %


def test_max_padding_lowers_the_budget_of_a_sample():
  wasteful, frugal = make(max_tokens=96), make(max_tokens=96, max_padding=0.03)
  assert frugal.max_tokens <= wasteful.max_tokens == 96
  assert frugal.plan.stats()["best_fit"]["padding"] <= wasteful.plan.stats()["best_fit"]["padding"]
  held_out = make(max_tokens=96, max_padding=0.03, num_eval=5, split="eval")
  assert held_out.max_tokens == make(max_tokens=96, max_padding=0.03, num_eval=5).max_tokens


def test_fingerprint_tells_plans_apart():
  prints = {
    make().fingerprint(),
    make(seed=1).fingerprint(),
    make(max_tokens=40).fingerprint(),
    make(packing="greedy").fingerprint(),
    make(num_samples=29).fingerprint(),
  }
  assert len(prints) == 5 and make(threads=0, workers=1).fingerprint() in prints


@pytest.mark.parametrize(
  "changes,message",
  [
    ({"max_tokens": 97}, "data.max_tokens=97 exceeds data.row_tokens=96"),
    ({"packing": "worst"}, "'worst' is none of best_fit, greedy"),
    ({"patch": (2, 8)}, r"is not \(frames, height, width\)"),
    ({"rows": 0}, "data.rows=0 is below 1"),
    ({"eval_fraction": 1.5}, "data.eval_fraction=1.5"),
  ],
)
def test_wrong_settings_are_named(changes, message):
  with pytest.raises(ValueError, match=message):
    make(**changes)


def test_the_model_must_take_the_patches():
  spec = dataclasses.replace(batch_spec(CONFIG), channels=5)
  with pytest.raises(ValueError, match="5 channels a patch, data.patch=.* has 384"):
    Pipeline(SyntheticSource(3), CONFIG, spec, tokenize)


def test_report_of_a_folder(clips, capsys):
  (clips / "3.mp4").write_bytes(b"")
  arguments = ["--max_frames=4", "--row_tokens=200", "--max_tokens=96", "--patch=2,8,8"]
  assert report_main.main([f"--source={clips}", *arguments]) == 0
  text = capsys.readouterr().out
  for part in (
    "3 samples: 3 videos, 0 images",
    "1 empty",
    "3.mp4  empty: 0 bytes",
    "64x48 (3)",
    "best_fit",
    "greedy",
  ):
    assert part in text
  assert report_main.main([f"--source={clips}", *arguments, "--json"]) == 0
  figures = json.loads(capsys.readouterr().out)
  assert figures["tokens"] == 3 * 96 and figures["packing"]["best_fit"]["rows"] == 2
  assert report_main.main([f"--source={clips / 'gone'}"]) == 2
  assert "error: data.source=" in capsys.readouterr().err
