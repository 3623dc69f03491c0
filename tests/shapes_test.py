"""The synthetic world and the tracker that judges it."""

import numpy as np
import pytest

from data_pipelines.sources import synthetic
from data_pipelines.sources.synthetic import COLOURS, DIRECTIONS, FPS, SHAPES, SyntheticSource
from sora_jax.evaluation import shapes
from sora_jax.packing.geometry import ClipSpec


def readings(source, count):
  for i in range(count):
    scene = source.scene(i)
    if scene.num_frames >= 8:
      frames = source.load(i, ClipSpec(scene.num_frames, scene.height, scene.width, FPS))
      yield scene, shapes.track(frames, COLOURS)


@pytest.mark.parametrize("held_out", [False, True])
def test_tracker_reads_rendered_truth_and_not_shuffled_prompts(held_out):
  pairs = list(readings(SyntheticSource(400, seed=3, held_out=held_out), 400))
  scenes, seen = zip(*pairs)
  assert np.mean([s.colour == r.colour for s, r in pairs]) >= 0.98
  assert np.mean([s.direction == r.direction for s, r in pairs]) >= 0.98
  shuffled = np.random.default_rng(0).permutation(len(scenes))
  assert np.mean([scenes[j].colour == r.colour for j, r in zip(shuffled, seen)]) < 0.3
  assert np.mean([scenes[j].direction == r.direction for j, r in zip(shuffled, seen)]) < 0.4


def test_tracker_sees_nothing_where_nothing_is():
  blank = np.full((8, 24, 24, 3), 120, np.uint8)
  assert shapes.track(blank, COLOURS).colour == ""
  still = np.repeat(SyntheticSource(1, image_share=1.0).load(0, ClipSpec(1, 24, 24)), 8, axis=0)
  reading = shapes.track(still, COLOURS)
  assert reading.colour and reading.direction == ""


def test_held_out_combinations_are_new_but_made_of_known_parts():
  train, held_out = synthetic.combinations(held_out=False), synthetic.combinations(held_out=True)
  assert not set(train) & set(held_out)
  assert len(train) + len(held_out) == len(COLOURS) * len(SHAPES) * len(DIRECTIONS)
  for part, names in enumerate((COLOURS, SHAPES, DIRECTIONS)):
    assert {c[part] for c in train} == {c[part] for c in held_out} == set(names)


def test_samples_are_a_function_of_seed_and_index():
  a, b, other = SyntheticSource(10, seed=1), SyntheticSource(99, seed=1), SyntheticSource(10, seed=2)
  spec = ClipSpec(4, 24, 24, FPS)
  np.testing.assert_array_equal(a.load(7, spec), b.load(7, spec))
  assert a.info(7) == b.info(7)
  assert a.scene(7) != other.scene(7)


def test_shapes_stay_in_the_frame_and_sizes_vary():
  source = SyntheticSource(300, seed=0)
  infos = [source.info(i) for i in range(300)]
  assert len({(i.height, i.width) for i in infos}) == len(synthetic.SIZES)
  assert {i.num_frames for i in infos} == {1, *synthetic.NUM_FRAMES}
  for i in range(60):
    scene = source.scene(i)
    frames = source.load(i, ClipSpec(scene.num_frames, scene.height, scene.width, FPS)).astype(int)
    rim = np.concatenate(
      [
        frames[:, 0].reshape(-1, 3),
        frames[:, -1].reshape(-1, 3),
        frames[:, :, 0].reshape(-1, 3),
        frames[:, :, -1].reshape(-1, 3),
      ]
    )
    # Antialiasing may tint the rim; the shape itself never leaves.
    assert np.median(np.abs(rim - np.array(synthetic.BACKGROUNDS[scene.background])).max(-1)) == 0
