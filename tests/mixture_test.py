"""Several sources in one run; what changes with the step."""

import collections
import dataclasses
import itertools
import re

import jax
import numpy as np
import pytest
from flax import nnx

from data_pipelines import report
from data_pipelines.pipeline import DataConfig, Pipeline, batch_spec, build_source, part_ends
from data_pipelines.sources.registry import register
from data_pipelines.sources.synthetic import SyntheticSource
from sora_jax.diffusion.objectives import ObjectiveConfig
from sora_jax.tasks import text_to_video
from sora_jax.types import NO_SAMPLE
from tests import media, tiny_dit

CONFIG = DataConfig(
  patch=(2, 8, 8),
  rows=4,
  row_tokens=192,
  max_tokens=48,
  row_samples=12,
  row_text_tokens=64,
  prefetch=1,
  packing_window=300,
)
CLIPS = {"source": "synthetic", "num_samples": 400, "source_kwargs": {"image_share": 0.0}}
STILLS = {"source": "synthetic", "num_samples": 90, "source_kwargs": {"image_share": 1.0}, "seed": 1}


def make(split="train", **changes) -> Pipeline:
  config = dataclasses.replace(CONFIG, **changes)
  return Pipeline(build_source(config), config, batch_spec(config), str.split, split=split)


def numbers(text: str) -> list[int]:
  return [1] * len(text.split())


def take(pipeline, count, start=0):
  pipeline.loader.tokenize = numbers
  batches = pipeline.batches(start)
  taken = list(itertools.islice(batches, count))
  batches.close()
  return taken


def drawn(pipeline, steps) -> list[tuple[int, int, int]]:
  """(step, epoch, sample) in the order of the plan."""
  ids = pipeline.fitted.ids
  return [
    (k, epoch, int(ids[n]))
    for k in range(steps)
    for row in pipeline.plan.rows_of_step(k)
    for epoch, n in zip(row.epochs, row.ids)
  ]


@pytest.mark.parametrize("weights", [(3, 1), (1, 1), (1, 9)])
def test_weights_and_epochs_without_repeats(weights):
  sources = {"clips": {**CLIPS, "weight": weights[0]}, "stills": {**STILLS, "weight": weights[1]}}
  pipeline = make(sources=sources)
  seen = drawn(pipeline, 150)
  of_clips = sum(i < 400 for *_, i in seen) / len(seen)
  assert of_clips == pytest.approx(weights[0] / sum(weights), rel=0.06)
  for (first, size), part in zip(((0, 400), (400, 90)), pipeline.plan.parts):
    epochs = collections.defaultdict(list)
    for _, epoch, i in seen:
      if first <= i < first + size:
        epochs[epoch].append(i)
    for epoch in range(max(epochs) // part.passes * part.passes):  # all but those of the last window are over
      assert sorted(epochs[epoch]) == list(range(first, first + size))
    assert len(set(epochs[max(epochs)])) == len(epochs[max(epochs)])
  assert drawn(make(sources=sources), 150) == seen


def test_padding_is_judged_by_what_is_seen():
  """Few samples of great weight, of which two do not fit into a row."""
  large = {**CLIPS, "num_samples": 40, "seed": 5, "weight": 9}
  sources = {"large": large, "stills": {**STILLS, "num_samples": 400, "weight": 1}}
  keys = {"row_tokens": 45, "max_tokens": 45, "sources": sources}
  wasteful = make(**keys).report()
  padding = wasteful.packing["best_fit"]["padding"]
  assert padding > 0.1 and wasteful.remedies
  for told in wasteful.remedies[:2]:
    promised = float(re.match(r"about ([\d.]+) % with data", told)[1]) / 100
    found = re.findall(r"data\.(\w+)=([\d.]+)", told)
    changes = {key: float(value) if "." in value else int(value) for key, value in found}
    better = make(**keys | changes).report().packing["best_fit"]["padding"]
    assert better == pytest.approx(promised, abs=0.02) and promised < padding - 0.01
  frugal = make(**keys, max_padding=0.03)
  assert frugal.max_tokens < 45 and frugal.report().packing["best_fit"]["padding"] < padding / 2


def test_without_weights_each_sample_is_seen_as_often():
  pipeline = make(sources={"clips": CLIPS, "stills": STILLS})
  assert pipeline.plan.shares == pytest.approx([400 / 490, 90 / 490], rel=0.01)
  counts = collections.Counter(i for row in pipeline.plan.rows_of_epoch(0) for i in row.ids)
  assert counts == dict.fromkeys(range(490), 1)
  held_out = make(sources={"clips": CLIPS, "stills": {**STILLS, "weight": 9}}, num_eval=40, split="eval")
  assert sum(map(len, (r.ids for r in held_out.plan.rows_of_epoch(0)))) == 40


def test_samples_are_those_of_their_sources_and_counted():
  pipeline = make(sources={"clips": {**CLIPS, "weight": 1}, "stills": {**STILLS, "weight": 1}})
  stills = SyntheticSource(90, 1, image_share=1.0)
  assert pipeline.source.info(403).name == "stills/synthetic-000003"
  spec = pipeline.specs[403]
  np.testing.assert_array_equal(pipeline.source.load(403, spec), stills.load(3, spec))
  for batch in take(pipeline, 4):
    counts = pipeline.counts(batch)
    ids = batch.sample_id_BN[batch.sample_id_BN != NO_SAMPLE]
    assert counts["stills"][0] == (ids >= 400).sum() > 0 and counts["clips"][0] == (ids < 400).sum() > 0
    assert sum(tokens for _, tokens in counts.values()) == (batch.segment_BL > 0).sum()
    fps = batch.fps_BN[batch.sample_id_BN >= 400]
    assert len(fps) and not fps.any()


def test_the_tally_of_a_batch_is_that_of_its_samples():
  sources = {"clips": {**CLIPS, "weight": 1}, "stills": {**STILLS, "weight": 1}}
  pipeline = make(sources=sources, token_drop={"rate": 0.5, "stop_step": 1000})
  for batch in take(pipeline, 2):
    tally, kept = pipeline.tally(batch), int((batch.segment_BL > 0).sum())
    assert tally["tokens/clips"] + tally["tokens/stills"] == kept
    assert tally["samples/stills"] == (batch.sample_id_BN >= 400).sum()
    assert tally["dropped_tokens"] == batch.grid_BN3.prod(-1).sum() - kept > kept / 2
    for b, n in np.argwhere(batch.sample_id_BN >= 0)[:9]:
      tally["tokens/stills" if batch.sample_id_BN[b, n] >= 400 else "tokens/clips"] -= (
        batch.segment_BL[b] == n + 1
      ).sum()
    assert min(tally.values()) >= 0
  assert part_ends(pipeline.source) == {"clips": 400, "stills": 490}
  assert list(make(source="synthetic", num_samples=9).tally(batch)) == ["dropped_tokens"]


def test_the_loss_of_each_source_sums_to_the_loss():
  batch, parts = tiny_dit.row(1), (("a", 4), ("b", 5), ("c", 99))
  assert sorted(batch.sample_id_BN[batch.sample_id_BN >= 0])[:2] == [3, 4]

  @jax.jit
  def loss():
    model = tiny_dit.task().init(nnx.Rngs(0))
    return text_to_video.loss(ObjectiveConfig(), model, batch, jax.random.key(0), parts=parts)

  _, sums = loss()
  by_part = np.array([sums[f"loss/{name}"] for name, _ in parts])
  np.testing.assert_allclose(by_part.sum(0), np.array(sums["loss"]), rtol=1e-5)
  tokens = [((batch.segment_BL == n + 1) & ~batch.given_BL).sum() for n in range(3)]
  assert by_part[:, 1].tolist() == tokens


def test_images_and_videos_from_folders_with_options_of_their_own(tmp_path, capsys):
  for name in ("a", "b"):
    (tmp_path / name).mkdir()
    media.make_clip(tmp_path / name / "1.mp4", 6)
  (tmp_path / "a" / "1.txt").write_text("a box")
  sources = {"a": {"source": str(tmp_path / "a")}, "b": {"source": str(tmp_path / "b")}}
  with pytest.raises(ValueError, match="none of the 1 media files .* has a caption"):
    make(sources=sources)
  sources["b"] |= {"captions_optional": True, "weight": 2}
  text = str(make(sources=sources).report())
  assert "of a         1 samples, 33.3 % of those seen" in text and "of b         1 samples, 66.7 %" in text
  assert report.main(["--sources={}", "--source=synthetic", "--num_samples=20"]) == 0


@pytest.mark.parametrize(
  "sources,message",
  [
    ({"a": {"source": "synthetic", "wieght": 1}}, "data.sources.a has no key wieght; it has weight, source"),
    ({"a": {"source": "synthetic", "weight": 0}}, "data.sources.a.weight=0 is not above 0"),
    ({"a": {"weight": 1}}, "data.sources.a has no source"),
  ],
)
def test_wrong_mixtures_are_named(sources, message):
  with pytest.raises(ValueError, match=message):
    make(sources=sources)


def test_pixels_and_latents_do_not_mix():
  def latents(config):
    source = SyntheticSource(5)
    source.encoder_hash = "abc"
    return source

  register("latents_of_test")(latents)
  with pytest.raises(ValueError, match="mixes what one model cannot see at once: a pixels, b latents of abc"):
    make(sources={"a": {"source": "synthetic"}, "b": {"source": "latents_of_test"}})


def tokens_of(pipeline, step) -> np.ndarray:
  return np.concatenate([pipeline.plan.lengths_of(row) for row in pipeline.plan.rows_of_step(step)])


def test_curriculum_raises_sizes_by_the_step_and_epochs_go_on():
  stages = ((0, 12, 2), (10, 24), (40, 48))
  pipeline = make(num_samples=300, curriculum=stages, packing_window=60)
  late = -(-pipeline.plan.rows_per_window // 4) + 6  # a window at most
  for step, most in ((0, 12), (9, 12), (10 + late, 24), (39, 24), (40 + late, 48), (200, 48)):
    assert tokens_of(pipeline, step).max() <= most
    assert tokens_of(pipeline, step).max() > most / 2
  epochs = collections.defaultdict(list)
  for _, epoch, i in drawn(pipeline, 200):
    epochs[epoch].append(i)
  assert max(epochs) >= 3
  for epoch in range(max(epochs)):
    assert sorted(epochs[epoch]) == list(range(300))
  whole = take(pipeline, 30)
  for a, b in zip(whole[14:], take(make(num_samples=300, curriculum=stages, packing_window=60), 16, 14)):
    for name, value in vars(a).items():
      np.testing.assert_array_equal(value, getattr(b, name), err_msg=name)
  frames = {int(t) for batch in whole[:5] for t in batch.grid_BN3[..., 0].ravel()}
  assert frames <= {0, 1}  # two frames are one patch
  text = str(pipeline.report())
  assert "from step   10: at most 24 tokens" in text and "from step   0: at most 12 tokens, 2 frames" in text


def test_a_sample_meets_every_resolution_in_turn():
  pipeline = make(num_samples=100, resolutions=(0.5, 0.75, 1.0), packing_window=100)
  sizes = collections.defaultdict(list)
  per_epoch = pipeline.plan.windows_per_epoch * pipeline.plan.rows_per_window
  for r in range(3 * per_epoch):
    row = pipeline.plan.row(r)
    for n, variant in zip(row.ids, row.variants):
      spec = pipeline.fitted.specs[row.phase][variant][pipeline.fitted.kinds[n]]
      sizes[n].append(spec.height * spec.width * spec.num_frames)
  assert len(sizes) == 100 and all(len(s) == 3 for s in sizes.values())
  assert np.mean([min(s) / max(s) for s in sizes.values()]) < 0.4
  batch = take(pipeline, 1)[0]
  grids = batch.grid_BN3[batch.sample_id_BN != NO_SAMPLE]
  assert len({tuple(g) for g in grids.tolist()}) > 6


@pytest.mark.parametrize(
  "changes,message",
  [
    ({"curriculum": ((5, 20),)}, "steps that begin at 0 and rise"),
    ({"curriculum": ((0, 20), (0, 30))}, "steps that begin at 0 and rise"),
    ({"curriculum": ((0, 500),)}, "max_tokens is from 1 to row_tokens=192"),
    ({"resolutions": (0.0,)}, "are not shares above 0"),
    ({"token_drop": {"rat": 1}}, "data.token_drop has no key rat; it has rate"),
    ({"token_drop": {"rate": 1.0}}, "data.token_drop.rate=1.0 is no share below 1"),
    ({"token_drop": {"schedule": "line"}}, "'line' is none of constant, sigmoid"),
    ({"caption_weights": (0.0,)}, "data.caption_weights"),
  ],
)
def test_wrong_schedules_are_named(changes, message):
  with pytest.raises(ValueError, match=message):
    make(**changes)
