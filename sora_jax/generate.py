"""Prompts -> videos and images: packs requests of any size into rows, denoises them, cuts them out again.

What comes out for a request is a function of the request, the weights and the sampler alone: its noise
depends on (seed, index, place of the token), its text is never cut to make room, and it attends to itself.
"""

import dataclasses
import functools
import math
from collections.abc import Callable, Iterator, Sequence

import jax
import jax.numpy as jnp
import numpy as np
from flax import nnx
from jax.sharding import NamedSharding
from jax.sharding import PartitionSpec as P

from sora_jax.diffusion import samplers
from sora_jax.diffusion.objectives import ObjectiveConfig
from sora_jax.packing import geometry, plan
from sora_jax.packing.geometry import Patch
from sora_jax.packing.pack import PackedSample, pack_row, stack_rows, text_of
from sora_jax.parallel import mesh as mesh_lib
from sora_jax.tasks import text_to_video
from sora_jax.types import NULL_ID, Array, BatchSpec, TokenBatch

Text = list[int] | np.ndarray  # ids, or an embedding (M, D)
TEXT_MULTIPLE = 32  # text tokens of a row are rounded up to this, so that few programs are compiled


@dataclasses.dataclass(frozen=True, kw_only=True)
class SampleConfig:
  """`every` and what follows are those of the grids during training (every 0 = only at the end).

  Of the `num_samples` captions, `num_seen` are of the training set, the others of the held-out set.
  """

  sampler: str = "euler"
  num_inference_steps: int = 25
  guidance_scale: float = 4.0  # 1 = the conditional prediction alone
  every: int = 0
  num_samples: int = 8
  num_seen: int = 0

  def __post_init__(self):
    if self.sampler not in samplers.SAMPLERS:
      raise ValueError(f"sampler {self.sampler!r} is not one of {', '.join(samplers.SAMPLERS)}")
    if self.num_inference_steps < 1:
      raise ValueError(f"num_inference_steps = {self.num_inference_steps} must be at least 1")


@dataclasses.dataclass(frozen=True, kw_only=True)
class Request:
  """One image (num_frames 1) or video to generate.

  `prompt_frames`, uint8 (T, H, W, 3) of the request's own height and width, are what it begins with: they
  come out as they went in. Those that fill whole temporal patches are used; fewer than one patch are filled
  up with the last, so an image prompt fills the first temporal patch with itself. `index` tells apart the
  videos of one prompt and seed.
  """

  prompt: str
  negative_prompt: str = ""
  width: int
  height: int
  num_frames: int = 1
  fps: float = 0.0
  seed: int = 0
  index: int = 0
  prompt_frames: np.ndarray | None = None


def check(request: Request, patch: Patch) -> None:
  """ValueError where the patch does not divide the request, naming the nearest sizes that it does."""
  pt, ph, pw = patch
  wrong = []
  for name, value, unit in (("width", request.width, pw), ("height", request.height, ph)):
    if value < 1 or value % unit:
      wrong.append(f"{name} = {value} is no multiple of {unit}; nearest: {_nearest(value, unit)}")
  frames = request.num_frames
  if frames != 1 and (frames < 1 or frames % pt):
    wrong.append(
      f"num_frames = {frames} is neither 1 nor a multiple of {pt}; nearest: {_nearest(frames, pt)}"
    )
  if wrong:
    raise ValueError(f"cannot generate {request.prompt!r}: " + ". ".join(wrong))
  if frames > 1 and request.fps <= 0:
    raise ValueError(f"cannot generate {request.prompt!r}: fps = {request.fps} of a video must be above 0")
  if request.index < 0:
    raise ValueError(f"cannot generate {request.prompt!r}: index = {request.index} is below 0")
  if request.prompt_frames is None:
    return
  given, size = len(request.prompt_frames), request.prompt_frames.shape[1:3]
  if size != (request.height, request.width):
    raise ValueError(
      f"the prompt frames of {request.prompt!r} are {size[1]}x{size[0]}, not {request.width}x{request.height}"
    )
  if frames <= _num_given(given, pt):
    raise ValueError(
      f"{given} prompt frames leave nothing to generate of num_frames = {frames}; "
      f"ask for at least {_num_given(given, pt) + pt}"
    )


def generate(model: nnx.Module, requests: Sequence[Request], **kwargs) -> list[np.ndarray]:
  """uint8 (T, H, W, 3) of every request, in order; keywords as of `generate_float`."""
  return [geometry.to_uint8(video) for video in generate_float(model, requests, **kwargs)]


def generate_float(
  model: nnx.Module,
  requests: Sequence[Request],
  *,
  config: SampleConfig,
  diffusion: ObjectiveConfig,
  tokenize: Callable[[str], Text],
  spec: BatchSpec,
  patch: Patch,
) -> list[np.ndarray]:
  """(T, H, W, 3) of every request, in order, about in [-1, 1].

  `tokenize` gives a prompt's ids or embedding. `spec` bounds the rows made at a time; they grow longer where
  one sample needs more tokens. Run it under `jax.set_mesh` to spread the rows over devices.
  """
  for request in requests:
    check(request, patch)
  if not requests:
    return []
  samples = [_pack_sample(r, tokenize, patch) for r in requests]
  negatives = [
    dataclasses.replace(
      s,
      **text_of(tokenize(r.negative_prompt))
      if r.negative_prompt
      else {"text_ids": [NULL_ID] * len(s.text_ids)},
    )
    for s, r in zip(samples, requests)
  ]
  guided = config.guidance_scale != 1.0
  rows, spec = _plan(samples, negatives if guided else samples, spec)
  graphdef, state = nnx.split(model)
  videos: list[np.ndarray | None] = [None] * len(requests)
  for first in range(0, len(rows), spec.rows):
    chunk = rows[first : first + spec.rows]
    seeds_BN2 = np.zeros((spec.rows, spec.samples, 2), np.uint32)
    for b, row in enumerate(chunk):
      for n, i in enumerate(row):
        seeds_BN2[b, n] = requests[i].seed % 2**32, requests[i].index
    tokens_BLC = _denoise(
      graphdef,
      state,
      _pack(samples, chunk, spec),
      _pack(negatives, chunk, spec) if guided else None,
      seeds_BN2,
      np.float32(config.guidance_scale),
      diffusion=diffusion,
      method=config.sampler,
      num_steps=config.num_inference_steps,
    )
    for row, tokens_LC in zip(chunk, _fetch_rows(tokens_BLC)):
      start = 0
      for i in row:
        stop = start + len(samples[i].tokens_LC)
        video = geometry.unpatchify(tokens_LC[start:stop], samples[i].grid, patch)
        videos[i] = video[: requests[i].num_frames]
        start = stop
  return videos


def _nearest(value: int, unit: int) -> str:
  """The multiples of `unit` on both sides, as many as there are."""
  low = max(value, 0) // unit * unit
  return " and ".join(str(n) for n in (low, low + unit) if n > 0)


def _num_given(prompt_frames: int, pt: int) -> int:
  return max(pt, prompt_frames // pt * pt)


def _pack_sample(request: Request, tokenize: Callable[[str], Text], patch: Patch) -> PackedSample:
  size = geometry.ClipSpec(request.num_frames, request.height, request.width, request.fps)
  grid = geometry.grid_of(size, patch)
  tokens_LC = np.zeros((math.prod(grid), 3 * math.prod(patch)), np.float32)
  given_L = np.zeros(len(tokens_LC), bool)
  if request.prompt_frames is not None:
    frames = geometry.pad_frames(
      request.prompt_frames[: _num_given(len(request.prompt_frames), patch[0])], patch[0]
    )
    given = geometry.patchify(geometry.to_float(frames), patch)
    tokens_LC[: len(given)], given_L[: len(given)] = given, True
  return PackedSample(
    tokens_LC=tokens_LC,
    grid=grid,
    sample_id=0,
    **text_of(tokenize(request.prompt)),
    fps=request.fps if request.num_frames > 1 else 0.0,
    given_L=given_L,
  )


def _plan(
  samples: Sequence[PackedSample], negatives: Sequence[PackedSample], spec: BatchSpec
) -> tuple[list[plan.Row], BatchSpec]:
  """Rows of requests and the shape of the batches that hold them."""
  lengths = [len(s.tokens_LC) for s in samples]
  tokens = max(spec.tokens, max(lengths))
  rows = plan.plan_window(lengths, row_tokens=tokens, max_samples=spec.samples)
  while len(rows) == 1 and tokens % 2 == 0 and sum(lengths) <= tokens // 2:
    tokens //= 2  # a lone small request need not fill a whole row
  text = max(sum(len(side[i].text_ids) for i in row) for row in rows for side in (samples, negatives))
  num_rows = min(len(rows), max(spec.rows, 1))
  mesh = jax.sharding.get_abstract_mesh()
  if not mesh.empty:
    devices = mesh_lib.data_devices(mesh)
    num_rows = -(-num_rows // devices) * devices
  text_tokens = -(-text // TEXT_MULTIPLE) * TEXT_MULTIPLE
  return rows, dataclasses.replace(spec, rows=num_rows, tokens=tokens, text_tokens=text_tokens)


def _pack(samples: Sequence[PackedSample], rows: Sequence[plan.Row], spec: BatchSpec) -> TokenBatch:
  packed = [pack_row([samples[i] for i in row], spec) for row in rows]
  missing = spec.rows - len(rows)
  return stack_rows([*packed, spec.zeros(missing)] if missing else packed)


def _fetch_rows(x_BLC: Array) -> Iterator[np.ndarray]:
  """Every row on every host. Between hosts one row at a time is whole on the devices, never all of them."""
  if x_BLC.is_fully_addressable:
    yield from np.asarray(x_BLC)
    return
  whole = jax.jit(lambda x, b: x[b], out_shardings=NamedSharding(x_BLC.sharding.mesh, P()))
  for b in range(len(x_BLC)):
    yield np.asarray(whole(x_BLC, b))


@functools.partial(jax.jit, static_argnames=("graphdef", "diffusion", "method", "num_steps"))
def _denoise(
  graphdef,
  state,
  batch: TokenBatch,
  negative: TokenBatch | None,
  seeds_BN2: Array,
  guidance_scale: Array,
  *,
  diffusion: ObjectiveConfig,
  method: str,
  num_steps: int,
) -> Array:
  """Clean tokens (B, L, C) of the batch; `negative` is the same batch with the texts to be led away from."""
  mesh = jax.sharding.get_abstract_mesh()
  if not mesh.empty:
    rows = P(mesh_lib.ROW_AXES)
    batch, negative, seeds_BN2 = jax.lax.with_sharding_constraint((batch, negative, seeds_BN2), rows)
  model = nnx.merge(graphdef, state)
  keys_BN = jax.vmap(jax.vmap(lambda s: jax.random.fold_in(jax.random.key(s[0]), s[1])))(seeds_BN2)
  noise_BLC = text_to_video.token_noise(batch, keys_BN)
  # Both sides of the guidance run as one batch of twice the rows; the text is encoded once.
  both = batch if negative is None else jax.tree.map(_side_by_side, batch, negative)
  text_BMD, pooled_BND = model.text_encoder(both)

  def denoiser(z_BLC, t_BN):
    if negative is None:
      return model.denoiser(z_BLC, t_BN, both, text_BMD, pooled_BND)
    z_BLC, t_BN = _side_by_side(z_BLC, z_BLC), _side_by_side(t_BN, t_BN)
    output = model.denoiser(z_BLC, t_BN, both, text_BMD, pooled_BND)
    output = output.reshape(-1, 2, *output.shape[1:])
    return samplers.guide(output[:, 0], output[:, 1], guidance_scale)

  z = samplers.sample(
    diffusion,
    denoiser,
    noise_BLC,
    samplers.time_grid(diffusion, num_steps, text_to_video.num_tokens(batch)),
    functools.partial(text_to_video.spread_to_tokens, batch),
    method=method,
    given_BL1=batch.given_BL[..., None],
    clean_BLC=batch.tokens_BLC,
  )
  return z if mesh.empty else jax.lax.with_sharding_constraint(z, P(mesh_lib.ROW_AXES))


def _side_by_side(x, y):
  """x0, y0, x1, y1, ...: both sides of a row stay on its device; one after the other they would move."""
  return jnp.stack([x, y], axis=1).reshape(-1, *x.shape[1:])


def lower_denoiser(
  model: nnx.Module, batch: TokenBatch, *, config: SampleConfig, diffusion: ObjectiveConfig
) -> jax.stages.Lowered:
  """The sampler's program for a model and a batch of shapes alone; run it under `jax.set_mesh`."""
  graphdef, state = nnx.split(model)
  rows, slots = batch.grid_BN3.shape[:2]
  return _denoise.lower(
    graphdef,
    state,
    batch,
    batch if config.guidance_scale != 1.0 else None,
    jax.ShapeDtypeStruct((rows, slots, 2), jnp.uint32),
    jax.ShapeDtypeStruct((), jnp.float32),
    diffusion=diffusion,
    method=config.sampler,
    num_steps=config.num_inference_steps,
  )
