"""Counted FLOPs of a training step: tiles without a live pair skipped, against a dense step with a mask.

Nothing is run. Rows are packed by the planner that training uses, and tiles are those of the TPU kernels, of
which a border tile is computed from its first to its last live `keys_at_once` alone.
Both sides do the same matrix products over all places of a row, padding included, and the same attention
kernels, 9 products a tile (2 forward, 3 for dq, 4 for dk and dv); the dense side does them for every tile.
"""

import dataclasses

import numpy as np

from sora_jax.models.dit import DiTConfig, linear_flops
from sora_jax.nn import attention_tpu
from sora_jax.nn.attention_tiles import block_size, count_live, keys_at_once
from sora_jax.packing.plan import RowPlan

MODELS = {
  "XL": DiTConfig(size="XL"),
  "5B": DiTConfig(width=3072, depth=24, heads=24),
  "30B": DiTConfig(width=6144, depth=64, heads=48),
}
ROW_TOKENS = (65536, 131072, 262144)
CHANNELS, TEXT_DIM, CAPTION = 64, 4096, 128  # of a patch, of a text feature; text tokens of a sample
NUM_SAMPLES, ROWS_PER_STEP, STEPS = 8192, 64, 4
PRODUCTS_FORWARD, PRODUCTS = 2, 9


@dataclasses.dataclass(frozen=True)
class Kind:
  """Equally likely sizes of a share of the samples; every 4 frames but the first are one latent frame, and a
  token is 16 x 16 pixels of it."""

  share: float
  frames: tuple[int, ...]
  sizes: tuple[tuple[int, int], ...]  # height, width

  def lengths(self, rng: np.random.Generator, count: int) -> np.ndarray:
    frames = rng.choice(self.frames, count)
    sizes = np.asarray(self.sizes)[rng.integers(len(self.sizes), size=count)]
    return ((frames - 1) // 4 + 1) * (sizes[:, 0] // 16) * (sizes[:, 1] // 16)


_VIDEO = tuple(range(17, 122, 8))
MIXES = {
  "256p images and short video": (
    Kind(0.5, (1,), ((256, 256), (192, 336), (336, 192))),
    Kind(0.5, (17, 33, 49, 65), ((256, 256), (192, 336), (336, 192))),
  ),
  "up to 480p": (
    Kind(0.2, (1,), ((512, 512), (480, 848), (848, 480))),
    Kind(0.8, _VIDEO, ((256, 256), (240, 416), (480, 480), (480, 848), (848, 480))),
  ),
  "up to 720p": (
    Kind(0.2, (1,), ((1024, 1024), (720, 1280), (1280, 720))),
    Kind(0.8, _VIDEO, ((480, 848), (848, 480), (720, 720), (720, 1280), (1280, 720))),
  ),
}


def mix_lengths(name: str, count: int = NUM_SAMPLES) -> np.ndarray:
  rng = np.random.default_rng(0)
  kinds = MIXES[name]
  counts = rng.multinomial(count, [kind.share for kind in kinds])
  return rng.permutation(np.concatenate([kind.lengths(rng, n) for kind, n in zip(kinds, counts)]))


def rows_of_segments(rows: list[np.ndarray], row_tokens: int) -> np.ndarray:
  segment = np.zeros((len(rows), row_tokens), np.int32)
  for at, lengths in enumerate(rows):
    segment[at, : lengths.sum()] = np.repeat(np.arange(1, len(lengths) + 1), lengths)
  return segment


def count(config: DiTConfig, rows: list[np.ndarray], row_tokens: int, blocks) -> dict[str, float]:
  """FLOPs of a step over these rows, both sides, and by the convention of backward = 2 x forward."""
  text_tokens = max(map(len, rows)) * CAPTION
  segment = rows_of_segments(rows, row_tokens)
  text = rows_of_segments([np.full(len(row), CAPTION) for row in rows], text_tokens)
  linear = linear_flops(
    config,
    tokens=segment.size,
    text_tokens=text.size,
    samples=sum(map(len, rows)),
    channels=CHANNELS,
    text_dim=TEXT_DIM,
  )
  block = keys_at_once(blocks.k)
  live, tiles = count_live(segment, blocks.q, block)
  block_text = keys_at_once(block_size(text_tokens, blocks.k))
  live_text, tiles_text = count_live(segment, blocks.q, block_text, text)
  product = 2.0 * config.width * config.depth * blocks.q

  def step(num, num_text, products):
    return 3 * linear + products * product * (num * block + num_text * block_text)

  sides = {
    "skipping": step(live, live_text, PRODUCTS),
    "dense": step(tiles, tiles_text, PRODUCTS),
    "skipping_3x": step(live, live_text, 3 * PRODUCTS_FORWARD),
    "dense_3x": step(tiles, tiles_text, 3 * PRODUCTS_FORWARD),
  }
  return {**sides, "live_share": live / tiles}


def packed_rows(lengths: np.ndarray, row_tokens: int, width: int) -> list[list[np.ndarray]]:
  """Rows of some steps; their costs are 28 d^2 sum(l) + 4 d sum(l^2) a layer, which the planner evens out."""
  plan = RowPlan(
    lengths,
    rows_per_step=ROWS_PER_STEP,
    row_tokens=row_tokens,
    max_samples=512,
    window=len(lengths),
    cost=(7.0 * width, 1.0),
  )
  return [[lengths[np.array(row.ids)] for row in plan.rows_of_step(step)] for step in range(STEPS)]


def table() -> list[dict]:
  blocks = attention_tpu.DEFAULT
  result = []
  for name in MIXES:
    lengths = mix_lengths(name)
    for row_tokens in ROW_TOKENS:
      line = {"mix": name, "row_tokens": row_tokens, "longest": int(lengths.max())}
      result.append(line)
      if lengths.max() > row_tokens:
        continue
      for model, config in MODELS.items():
        steps = packed_rows(lengths, row_tokens, config.width)
        rows = [row for step in steps for row in step]
        cost = lambda row, d=config.width: 7.0 * d * row.sum() + (row.astype(float) ** 2).sum()  # noqa: E731
        costs = np.array([[cost(row) for row in step] for step in steps])
        counted = count(config, rows, row_tokens, blocks)
        line[model] = {
          "ratio": counted["dense"] / counted["skipping"],
          "ratio_3x": counted["dense_3x"] / counted["skipping_3x"],
          "petaflop_per_step": counted["skipping"] / STEPS / 1e15,
          "imbalance": float((costs.max(1) / costs.mean(1)).mean()),
          "live_share": counted["live_share"],
          "samples_per_row": sum(map(len, rows)) / len(rows),
          "padding": 1 - sum(int(row.sum()) for row in rows) / (len(rows) * row_tokens),
        }
  return result


def markdown(lines: list[dict]) -> str:
  models = " | ".join(f"{name}: d = {c.width}, {c.depth} layers" for name, c in MODELS.items())
  out = [
    f"| mix | row | samples a row | padding | live tiles | {models} | imbalance of {ROWS_PER_STEP} rows |",
    "|---" * (6 + len(MODELS)) + "|",
  ]
  for line in lines:
    head = f"| {line['mix']} | {line['row_tokens']:,}"
    if next(iter(MODELS)) not in line:
      rest = [f"the longest sample has {line['longest']:,} tokens"] + ["-"] * (3 + len(MODELS))
    else:
      first = line[next(iter(MODELS))]
      rest = [f"{first['samples_per_row']:.1f}", f"{first['padding']:.1%}", f"{first['live_share']:.3f}"]
      rest += [f"{line[model]['ratio']:.2f} ({line[model]['ratio_3x']:.2f})" for model in MODELS]
      rest += [", ".join(f"{line[model]['imbalance']:.2f}" for model in MODELS)]
    out.append(f"{head} | {' | '.join(rest)} |")
  return "\n".join(out)
