"""Token dropping: rates by schedule, which tokens stay, and what a batch then holds."""

import dataclasses
import itertools

import numpy as np
import pytest
from scipy import stats

from data_pipelines.pipeline import DataConfig, Pipeline, batch_spec, build_source
from sora_jax.packing import token_drop
from sora_jax.packing.geometry import positions
from sora_jax.packing.token_drop import TokenDrop
from sora_jax.types import NO_SAMPLE
from tests.batches import take

CONFIG = DataConfig(
  num_samples=120,
  patch=(2, 8, 8),
  rows=4,
  row_tokens=128,
  max_tokens=64,
  row_samples=24,
  row_text_tokens=200,
  prefetch=1,
  packing_window=120,
)


def tokenize(text: str) -> list[int]:
  return [1, 2]


def make(split="train", **changes) -> Pipeline:
  config = dataclasses.replace(CONFIG, **changes)
  return Pipeline(build_source(config), config, batch_spec(config), tokenize, split=split)


def test_constant_rates_and_when_they_stop():
  assert token_drop.stages(TokenDrop()) == [(0, (0.0,))]
  assert token_drop.stages(TokenDrop(rate=0.5, stop_step=90)) == [(0, (0.5,)), (90, (0.0,))]
  assert token_drop.num_kept(100, 0.5) == 50 and token_drop.num_kept(1, 0.9) == 1
  assert token_drop.num_kept(10, 0.0) == 10


def test_beta_rates_are_quantiles_of_their_distribution():
  ((_, rates),) = token_drop.stages(TokenDrop(rate=0.4, distribution="beta", levels=64, most=0.99))
  law = stats.beta(0.4 * 4, 0.6 * 4)
  assert np.mean(rates) == pytest.approx(0.4, abs=0.01)
  assert np.std(rates) == pytest.approx(law.std(), rel=0.05)
  assert list(rates) == sorted(rates) and rates[32] == pytest.approx(law.median(), abs=0.01)


def test_sigmoid_falls_from_one_rate_to_the_other():
  config = TokenDrop(rate=0.8, final_rate=0.2, schedule="sigmoid", sigmoid_steps=1600, stop_step=3000)
  steps, rates = zip(*token_drop.stages(config))
  means = [r[0] for r in rates]
  assert steps[0] == 0 and list(steps) == sorted(set(steps)) and steps[-1] == 3000
  assert all(a > b for a, b in itertools.pairwise(means)) and means[-1] == 0
  assert means[0] == pytest.approx(0.8, abs=0.01) and means[-2] == pytest.approx(0.2, abs=0.01)
  assert means[7] + means[8] == pytest.approx(1.0)  # symmetric about the middle


def test_random_choice_is_even_and_a_function_of_its_key():
  tokens = np.zeros((60, 4), np.float32)
  kept = [
    token_drop.keep(tokens, (3, 4, 5), 20, select="random", key=(0, e, 7), given_L=None) for e in range(400)
  ]
  assert all(len(k) == 20 and (np.diff(k) > 0).all() for k in kept)
  assert np.array_equal(
    kept[3], token_drop.keep(tokens, (3, 4, 5), 20, select="random", key=(0, 3, 7), given_L=None)
  )
  share = np.bincount(np.concatenate(kept), minlength=60) / 400
  assert np.abs(share - 1 / 3).max() < 0.1


def test_similar_tokens_go_first():
  video = np.zeros((3, 4, 5, 2), np.float32)
  video[1, 2, 3] = 5.0  # comes, and goes again
  kept = token_drop.keep(
    video.reshape(60, 2), (3, 4, 5), 3, select="similar", key=(0, 0, 0), given_L=None
  ).tolist()
  assert kept == [0, 20 + 13, 40 + 13]
  image = np.zeros((1, 4, 6, 1), np.float32)
  image[0, :, 3:] = 1.0  # an edge
  kept = token_drop.keep(image.reshape(24, 1), (1, 4, 6), 2, select="similar", key=(0, 0, 0), given_L=None)
  assert kept.tolist() == [0, 3]


def test_something_to_learn_from_stays():
  given = np.arange(60) < 59
  for key in range(20):
    kept = token_drop.keep(np.zeros((60, 4)), (3, 4, 5), 2, select="random", key=(0, key, 0), given_L=given)
    assert 59 in kept and len(set(kept.tolist())) == 2


@pytest.mark.parametrize("select", ["random", "similar"])
@pytest.mark.parametrize("distribution", ["fixed", "beta"])
def test_batches_hold_what_the_plan_says_and_keep_positions(select, distribution):
  drop = {"rate": 0.5, "select": select, "distribution": distribution, "levels": 4}
  dropped, whole = make(token_drop=drop, given_probability=0.5), make(given_probability=0.5)
  rates = set()
  for batch in take(dropped, 8):
    assert not batch.unreadable_B.any()
    for b, n in np.argwhere(batch.sample_id_BN != NO_SAMPLE):
      i, grid = int(batch.sample_id_BN[b, n]), tuple(batch.grid_BN3[b, n].tolist())
      mine = batch.segment_BL[b] == n + 1
      full = int(np.prod(grid))
      rates.add(round(1 - mine.sum() / full, 1))
      places = [np.flatnonzero((positions(grid) == p).all(axis=1))[0] for p in batch.position_BL3[b][mine]]
      assert places == sorted(set(places))
      clip = whole.source.load(i, whole.specs[i])
      first = places[0]
      t, y, x = (int(v) for v in positions(grid)[first])
      pixel = clip[min(2 * t, len(clip) - 1), 8 * y, 8 * x] / 127.5 - 1
      np.testing.assert_allclose(batch.tokens_BLC[b][mine][0, :3], pixel, atol=1e-6)
  assert len(rates) > 2 if distribution == "beta" else rates <= {0.4, 0.5}
  assert dropped.plan.stats()["best_fit"]["padding"] < 0.1
  per_row = [p.plan.stats()["best_fit"]["samples_per_row"] for p in (whole, dropped)]
  assert per_row[1] > 1.6 * per_row[0]


def test_off_at_the_end_and_for_held_out_samples():
  drop = {"rate": 0.5, "distribution": "beta", "stop_step": 6}
  pipeline = make(token_drop=drop)
  late = 6 + 12  # a window at most
  dropped = [share_dropped(batch) for batch in take(pipeline, late + 4)]
  assert min(dropped[:6]) > 0.3 and max(dropped[late:]) == 0
  for a, b in zip(take(pipeline, 10, 3), take(make(token_drop=drop), 10, 3)):
    np.testing.assert_array_equal(a.tokens_BLC, b.tokens_BLC)
  held_out = make(token_drop=drop, num_eval=20, split="eval")
  assert not any(share_dropped(batch) for batch in held_out.epoch_batches())
  stages = pipeline.report().stages
  assert stages[0]["dropped"] == pytest.approx(0.5, abs=0.06) and stages[1]["dropped"] == 0
  assert "% of them dropped" in str(pipeline.report())


def share_dropped(batch) -> float:
  return 1 - (batch.segment_BL > 0).sum() / np.prod(batch.grid_BN3, axis=-1).sum()
