"""Sampling: requests of any size in packed rows, image and video prompts, prompt files."""

import dataclasses

import jax
import numpy as np
import pytest
from flax import nnx

from sora_jax import prompts
from sora_jax.conditioning import text
from sora_jax.conditioning.text import TextConfig
from sora_jax.diffusion.objectives import ObjectiveConfig
from sora_jax.generate import Request, SampleConfig, check, generate, generate_float
from sora_jax.models.dit import DiTConfig
from sora_jax.packing.pack import PackedSample, pack_row
from sora_jax.parallel.mesh import MeshConfig, make_mesh
from sora_jax.tasks import text_to_video
from sora_jax.types import BatchSpec

PATCH = (2, 4, 4)
SPEC = BatchSpec(rows=2, tokens=32, channels=3 * 2 * 4 * 4, samples=3, text_tokens=16)
DIFFUSION = ObjectiveConfig(prediction="x0", shift_base_tokens=8)
TEXT = TextConfig(vocab_size=64, max_tokens=12, width=16, depth=1, heads=2)
REQUESTS = [
  Request(prompt="a red circle", width=16, height=8, num_frames=4, fps=8.0),
  Request(prompt="a photo", negative_prompt="blue", width=8, height=12, seed=5),
  Request(prompt="much larger than a row", width=24, height=24, num_frames=4, fps=4.0, seed=1),
  Request(prompt="a red circle", width=16, height=8, num_frames=4, fps=8.0, index=1),
  Request(prompt="", width=4, height=4, num_frames=2, fps=8.0),
]


def tokenize(prompt: str) -> list[int]:
  return [2, *(3 + ord(c) % 60 for c in prompt)][: TEXT.max_tokens]


@pytest.fixture(scope="module")
def model():
  task = text_to_video.build(
    model=DiTConfig(width=32, depth=2, heads=2), text_config=TEXT, diffusion=DIFFUSION, batch_spec=SPEC
  )
  graph, state = nnx.split(task.init(nnx.Rngs(0)))
  leaves, tree = jax.tree.flatten(state)
  rng = np.random.default_rng(1)
  # Zero-initialised outputs would hide everything.
  return nnx.merge(
    graph, jax.tree.unflatten(tree, [x + 0.1 * rng.normal(size=x.shape).astype(np.float32) for x in leaves])
  )


def make(model, requests, *, fn=generate_float, **changes):
  config = SampleConfig(**{"num_inference_steps": 3, "guidance_scale": 2.0} | changes)
  return fn(model, requests, config=config, diffusion=DIFFUSION, tokenize=tokenize, spec=SPEC, patch=PATCH)


def frames(shape, seed=0):
  return np.random.default_rng(seed).integers(0, 256, shape, dtype=np.uint8)


@pytest.mark.parametrize("sampler", ["euler", "heun"])
def test_packed_is_alone(model, sampler):
  """In any company and order, guided or not: the same sample."""
  alone = [make(model, [r], sampler=sampler)[0] for r in REQUESTS]
  assert [v.shape for v in alone] == [(r.num_frames, r.height, r.width, 3) for r in REQUESTS]
  for order in (range(5), [4, 2, 1, 3, 0]):
    for i, video in zip(order, make(model, [REQUESTS[i] for i in order], sampler=sampler)):
      np.testing.assert_allclose(video, alone[i], atol=1e-5)


def test_seed_index_prompts_and_guidance_matter(model):
  base = REQUESTS[0]
  first = make(model, [base])[0]
  np.testing.assert_array_equal(first, make(model, [base])[0])
  for change in ({"seed": 1}, {"index": 1}, {"prompt": "a blue circle"}, {"negative_prompt": "blue"}):
    assert np.abs(make(model, [dataclasses.replace(base, **change)])[0] - first).max() > 1e-3, change
  assert np.abs(make(model, [base], guidance_scale=1.0)[0] - first).max() > 1e-3


def test_no_negative_prompt_is_the_caption_drop_of_training(model):
  """Guidance 0 is the unconditional prediction: what `drop_captions` shows the network."""
  request, grid = REQUESTS[0], (2, 2, 4)
  sample = PackedSample(
    tokens_LC=np.zeros((16, SPEC.channels), np.float32), grid=grid, sample_id=0, fps=8.0,
    text_ids=tokenize(request.prompt),
  )  # fmt: skip
  batch = text.drop_captions(pack_row([sample], SPEC), np.ones((1, 3), bool))
  nulls = np.asarray(batch.text_ids_BM[0])[: len(sample.text_ids)]
  unconditional = make(model, [request], guidance_scale=0.0)[0]
  explicit = dataclasses.replace(request, prompt="")
  conditional = generate_float(
    model, [explicit], config=SampleConfig(num_inference_steps=3, guidance_scale=1.0), diffusion=DIFFUSION,
    tokenize=lambda prompt: list(nulls), spec=SPEC, patch=PATCH,
  )[0]  # fmt: skip
  np.testing.assert_allclose(unconditional, conditional, atol=1e-5)


def test_given_frames_come_out_as_given(model):
  image, clip = frames((1, 8, 16, 3)), frames((4, 8, 16, 3), 1)
  requests = [
    dataclasses.replace(REQUESTS[0], prompt_frames=image),
    dataclasses.replace(REQUESTS[0], num_frames=8, prompt_frames=clip),
    dataclasses.replace(REQUESTS[0], num_frames=8, prompt_frames=clip[:3]),  # the odd frame fills no patch
    REQUESTS[0],
  ]
  from_image, from_clip, from_odd, free = make(model, requests, fn=generate)
  assert from_image.dtype == np.uint8 and from_image.shape == (4, 8, 16, 3)
  np.testing.assert_array_equal(from_image[:2], np.repeat(image, 2, axis=0))
  np.testing.assert_array_equal(from_clip[:4], clip)
  np.testing.assert_array_equal(from_odd[:2], clip[:2])
  assert (from_odd[2] != clip[2]).any()
  # What was given steers what was not.
  assert (from_image[2:] != free[2:]).any()


def test_rows_over_devices(model):
  """Eight devices, two of them holding a row: the same samples."""
  alone = make(model, REQUESTS)
  with jax.set_mesh(make_mesh(MeshConfig(fsdp=2, context=2, tensor=2))):
    for a, b in zip(alone, make(model, REQUESTS)):
      np.testing.assert_allclose(a, b, atol=1e-5)


@pytest.mark.parametrize(
  "change,says",
  [
    ({"width": 15}, "width = 15 is no multiple of 4; nearest: 12 and 16"),
    ({"height": 3}, "height = 3 is no multiple of 4; nearest: 4"),
    ({"height": -4}, "height = -4 is no multiple of 4; nearest: 4"),
    ({"num_frames": 7}, "num_frames = 7 is neither 1 nor a multiple of 2; nearest: 6 and 8"),
    ({"index": -1}, "'a red circle': index = -1 is below 0"),
    ({"fps": 0.0}, "fps = 0.0 of a video must be above 0"),
    ({"prompt_frames": frames((1, 8, 12, 3))}, "the prompt frames of 'a red circle' are 12x8, not 16x8"),
    (
      {"prompt_frames": frames((4, 8, 16, 3))},
      "leave nothing to generate of num_frames = 4; ask for at least 6",
    ),
  ],
)
def test_sizes_that_do_not_work_name_those_that_do(change, says):
  with pytest.raises(ValueError, match="a red circle|prompt frames") as error:
    check(dataclasses.replace(REQUESTS[0], **change), PATCH)
  assert says in str(error.value)


def test_prompt_files(tmp_path):
  path = tmp_path / "prompts.txt"
  path.write_text(
    "# a comment\n\na red circle, 8-sided\nfast -- not slow --w 32 --h 24 --f 8 --fps 12 --d 7 --k 2\n"
    "dog --s 5 --l 2.5 --n ugly blur --i a b.png\n"
  )
  assert prompts.read(path) == [
    {"prompt": "a red circle, 8-sided"},
    {
      "prompt": "fast -- not slow",
      "width": 32,
      "height": 24,
      "num_frames": 8,
      "fps": 12.0,
      "seed": 7,
      "index": 2,
    },
    {
      "prompt": "dog",
      "num_inference_steps": 5,
      "guidance_scale": 2.5,
      "negative_prompt": "ugly blur",
      "image": "a b.png",
    },
  ]
  written = [dataclasses.replace(REQUESTS[0], prompt="#1 dog\n--w 9 barks"), REQUESTS[1]]
  prompts.write(path, written)
  back = prompts.read(path)
  assert [b["prompt"] for b in back] == ["1 dog -w 9 barks", "a photo"]
  assert [(b["width"], b["num_frames"], b["fps"]) for b in back] == [(16, 4, 8.0), (8, 1, 0.0)]
  prompts.write(path, [REQUESTS[4]])
  assert prompts.read(path)[0]["prompt"] == ""
  for bad, says in (("dog --w wide", "2: --w 'wide' is not a number"), ("dog --x 1", "unknown option --x")):
    path.write_text(f"cat\n{bad}\n")
    with pytest.raises(ValueError, match=says):
      prompts.read(path)
