"""Embeddings of captions made while training or before: the same batches, and none of another encoder."""

import dataclasses
import json

import jax
import jax.numpy as jnp
import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import pytest
from flax import nnx

from data_pipelines import shard_bytes
from data_pipelines.pipeline import DataConfig, Pipeline, batch_spec
from data_pipelines.sources.mixture import MixedSource
from data_pipelines.sources.shards import ShardSource
from data_pipelines.texts import Embedder
from sora_jax.conditioning import text
from sora_jax.conditioning.text import TextConfig, TextEncoder
from sora_jax.diffusion.objectives import ObjectiveConfig
from sora_jax.generate import Request, SampleConfig, generate_float
from sora_jax.models.dit import DiTConfig
from sora_jax.packing.pack import PackedSample, pack_row, text_of
from sora_jax.tasks import text_to_video
from sora_jax.types import NULL_ID, START_ID, BatchSpec
from tests.batches import assert_same, take
from tests.prepared import make_set, run_inline

WIDTH, MAX_TOKENS = 6, 3
NAME = "tests.texts_test:Words"


class Words:
  """A stand-in for a large encoder: a vector a word, that depends on the words before it."""

  hash = "words-1"

  def __call__(self, caption):
    marks = [sum(map(ord, word)) for word in caption.split()]
    phase = np.cumsum(marks)[:, None] * np.linspace(0.1, 1.7, WIDTH)
    return np.sin(phase).astype(np.float32)


class Others:
  hash = "words-2"

  def __call__(self, caption):
    return -Words()(caption)


class Wrong:
  hash = "wrong"

  def __call__(self, caption):
    return {"big": np.full((2, WIDTH), 1e6), "flat": np.ones(WIDTH)}[caption.split()[0]]


@pytest.fixture(scope="module")
def sets(tmp_path_factory):
  """(clips, shards of them with embeddings): captions of 1 to 4 words, two of a clip, none of another."""
  folder = tmp_path_factory.mktemp("texts")
  data = make_set(folder / "data", clips=6)
  (data / "0.txt").unlink()
  (data / "0.json").write_text(json.dumps({"captions": ["a b c d", "wholly another"]}))
  (data / "1.txt").write_text("word")
  (data / "2.txt").unlink()
  run_inline(
    data,
    folder / "out",
    {"captions_optional": True},
    stages=("probe", "resize", "encode_text", "write"),
    text=NAME,
    codec="raw",
  )
  run_inline(
    data, folder / "bare", {"captions_optional": True}, stages=("probe", "resize", "write"), codec="raw"
  )
  return folder / "bare", folder / "out"


def make(source, config=None, **changes):
  keys = {"text": NAME, "text_width": WIDTH, "row_text_tokens": 16, "captions_optional": True}
  keys |= {"patch": (4, 16, 16), "rows": 2, "row_tokens": 64, "row_samples": 4, "min_size": 16, "prefetch": 1}
  config = DataConfig(**keys | changes)
  embedder = Embedder(config.text, config.text_width, MAX_TOKENS)
  return Pipeline(source, config, batch_spec(config), embedder)


def test_stored_and_made_while_training_are_the_same(sets):
  bare, out = sets
  online, stored, by_hash = (
    make(ShardSource(str(bare))),
    make(ShardSource(str(out))),
    make(ShardSource(str(out)), text="words-1"),
  )
  seen = set()
  for a, b, c in zip(*(take(p, 24) for p in (online, stored, by_hash))):
    assert_same(a, b)
    assert_same(b, c)
    assert a.text_BMD.dtype == np.float16 and a.text_BMD.shape == (2, 16, WIDTH)
    for row in range(2):
      for slot, i in enumerate(a.sample_id_BN[row]):
        own = a.text_segment_BM[row] == slot + 1
        seen |= (
          {(int(i), tuple(a.text_ids_BM[row, own].tolist()), a.text_BMD[row, own].tobytes())}
          if i >= 0
          else set()
        )
  whole = Words()
  infos = [stored.source.info(i) for i in range(6)]
  expected = set()
  for info in infos:
    for caption in info.captions:
      made = whole(caption)[:MAX_TOKENS].astype(np.float16)
      expected.add((info.id, (START_ID,) * len(made), made.tobytes()))
    if not info.captions:
      expected.add((info.id, (NULL_ID,), np.zeros(WIDTH, np.float16).tobytes()))
  assert seen == expected and len(seen) == 7
  report = stored.report()
  assert str(report) == str(by_hash.report()) and report.text_tokens == 3 + 1 + 1 + 3 * 3
  assert str(online.report()).splitlines()[1:] == str(report).splitlines()[1:]
  assert online.fingerprint() != make(ShardSource(str(bare)), text="tests.texts_test:Others").fingerprint()


class OnDevice:
  hash = "words-on-device"

  def __call__(self, caption):
    return jax.jit(jnp.sin)(Words()(caption))


def test_an_encoder_may_use_the_device_during_a_training_loop(sets):
  with jax.transfer_guard("disallow"):
    made = make(ShardSource(str(sets[0])), text="tests.texts_test:OnDevice").epoch_batches()
  assert sum((b.sample_id_BN >= 0).sum() for b in made) == 6


def test_embeddings_of_another_encoder_are_refused(sets):
  bare, out = map(str, sets)
  line = "holds text embeddings of encoder words-1, the run wants text embeddings of encoder words-2: prepare"
  with pytest.raises(ValueError, match=line):
    make(ShardSource(out), text="tests.texts_test:Others")
  with pytest.raises(ValueError, match=line):
    make(ShardSource(out), text="words-2")
  with pytest.raises(
    ValueError, match="holds no text embeddings, the run wants text embeddings of encoder words-1"
  ):
    make(ShardSource(bare), text="words-1")
  with pytest.raises(ValueError, match="needs data.text_width"):
    DataConfig(text=NAME)
  with pytest.raises(ValueError, match="cannot import no_such_module"):
    Embedder("no_such_module:X", 3)
  with pytest.raises(ValueError, match="has no hash or cannot be called"):
    Embedder("tests.texts_test:WIDTH", 3)
  with pytest.raises(ValueError, match=r"the embedding of 'a b' has shape \(2, 6\): \(tokens, 7\) is needed"):
    Embedder(NAME, 7)("a b")
  with pytest.raises(ValueError, match="'big' has values that float16 cannot hold"):
    Embedder("tests.texts_test:Wrong", WIDTH)("big")
  with pytest.raises(ValueError, match="'other' .*: KeyError|fails on 'other': KeyError"):
    Embedder("tests.texts_test:Wrong", WIDTH)("other")
  with pytest.raises(ValueError, match="'words-1' is only the hash of an encoder"):
    Embedder("words-1", WIDTH)("a prompt")


def test_values_that_the_type_cannot_hold_are_not_stored(tmp_path):
  data = make_set(tmp_path / "data", clips=1)
  (data / "0.txt").write_text("big")
  keys = {"stages": ("probe", "resize", "encode_text", "write"), "text": "tests.texts_test:Wrong"}
  with pytest.raises(ValueError, match="float16 cannot hold: see --latent_dtype"):
    run_inline(data, tmp_path / "out", **keys)
  run_inline(data, tmp_path / "out", **keys, latent_dtype="bfloat16")
  source = ShardSource(str(tmp_path / "out"))
  np.testing.assert_allclose(source.text(0).astype(np.float32), 1e6, rtol=4e-3)
  with pytest.raises(ValueError, match="float16 cannot hold"):
    next(make(source, text="wrong").batches())


def test_a_mixture_embeds_what_has_none(sets):
  bare, out = map(str, sets)
  parts = [("made", ShardSource(bare), None), ("stored", ShardSource(out), None)]
  online = [("made", ShardSource(bare), None), ("stored", ShardSource(bare), None)]
  for a, b in zip(take(make(MixedSource(parts)), 6), take(make(MixedSource(online)), 6)):
    assert_same(a, b)
  with pytest.raises(ValueError, match="holds no text embeddings"):
    make(MixedSource(parts), text="words-1")
  with pytest.raises(ValueError, match="encoder words-1, the run wants text embeddings of encoder words-2"):
    make(MixedSource(parts), text="tests.texts_test:Others")


def test_a_record_is_read_once(sets, monkeypatch):
  source, reads = ShardSource(str(sets[1])), []
  read = source._files.record
  monkeypatch.setattr(source._files, "record", lambda *a: reads.append(a) or read(*a))
  pipeline = make(source, cache_mb=0, threads=0)
  batch = take(pipeline, 1)[0]
  with_text = sum(bool(source.info(int(i)).captions) for i in batch.sample_id_BN.ravel() if i >= 0)
  assert with_text > 2 and len(reads) == (batch.sample_id_BN >= 0).sum()


def test_an_index_of_before_is_read(sets, tmp_path):
  """Without the column of lengths."""
  folder = tmp_path / "old"
  folder.mkdir()
  for path in sets[1].rglob("*"):
    if path.is_file() and ".prepare" not in path.parts:
      (folder / path.relative_to(sets[1])).parent.mkdir(exist_ok=True)
      (folder / path.relative_to(sets[1])).write_bytes(path.read_bytes())
  sink = pa.BufferOutputStream()
  pq.write_table(pq.read_table(folder / "index.parquet").drop_columns(["text_tokens"]), sink)
  index = sink.getvalue().to_pybytes()
  (folder / "index.parquet").write_bytes(index)
  about = json.loads((folder / "shards.json").read_text()) | {"index_checksum": shard_bytes.digest(index)}
  (folder / "shards.json").write_text(json.dumps(about))
  old, new = make(ShardSource(str(folder))), make(ShardSource(str(sets[1])))
  assert old.source.text_tokens(0) is None and new.source.text_tokens(5) == 4
  assert old.report().text_tokens == new.report().text_tokens
  assert_same(*(take(p, 1)[0] for p in (old, new)))


SPEC = BatchSpec(rows=1, tokens=16, channels=12, samples=3, text_tokens=12, text_width=WIDTH)


def packed(*captions):
  rng = np.random.default_rng(0)
  return pack_row(
    [
      PackedSample(
        tokens_LC=rng.normal(size=(4, 12)).astype(np.float32), grid=(1, 2, 2), sample_id=i,
        **text_of(Embedder(NAME, WIDTH)(caption)),
      )
      for i, caption in enumerate(captions)
    ],
    SPEC,
  )  # fmt: skip


def model(**kwargs):
  config = TextConfig(width=16, depth=1, heads=2)
  return text_to_video.build(
    model=DiTConfig(width=16, depth=1, heads=2),
    text_config=config,
    diffusion=ObjectiveConfig(**kwargs),
    batch_spec=SPEC,
  )


def test_the_model_sees_each_embedding_alone():
  encoder = TextEncoder(TextConfig(width=16, depth=1, heads=2), embedding_width=WIDTH, rngs=nnx.Rngs(0))
  both, alone = packed("a b c", "d e"), packed("d e")
  x, pooled = encoder(both)
  y, pooled_alone = encoder(alone)
  np.testing.assert_allclose(x[0, 3:5], y[0, :2], atol=1e-5)
  np.testing.assert_allclose(pooled[0, 1], pooled_alone[0, 0], atol=1e-5)
  assert np.abs(x[0, :2] - y[0, :2]).max() > 0.1
  dropped = text.drop_captions(both, np.array([[True, False, False]]))
  z, pooled_dropped = encoder(dropped)
  none, _ = encoder(packed(""))
  np.testing.assert_allclose(pooled_dropped[0, 0], np.asarray(none)[0, 0], atol=1e-5)
  np.testing.assert_allclose(z[0, 3:5], x[0, 3:5], atol=1e-5)
  assert text.model_flops(encoder.config, both, WIDTH)[0] > text.model_flops(encoder.config, both)[0]


def test_training_moves_the_projection_and_the_unconditional():
  task = model(caption_drop=0.5)
  net = task.init(nnx.Rngs(0))
  graph, params, rest = nnx.split(net, nnx.Param, ...)
  for _, leaf in nnx.to_flat_state(params):  # adaLN-zero starts with gradients of zero
    leaf[...] = leaf[...] + 0.05 * jax.random.normal(jax.random.key(1), leaf[...].shape)
  batch = packed("a b c", "d e", "f")

  def loss(params):
    return task.loss_fn(nnx.merge(graph, params, rest), batch, jax.random.key(3))[0]

  grads = jax.jit(jax.grad(loss))(params)
  assert float(np.abs(grads["text_encoder"]["project"]["w"][...]).max()) > 0
  assert float(np.abs(grads["text_encoder"]["null"][...]).max()) > 0
  assert task.flops_fn(batch)[0] > 0


def test_samples_follow_their_prompt_and_guidance():
  net = model().init(nnx.Rngs(0))
  for _, leaf in nnx.to_flat_state(nnx.state(net, nnx.Param)):
    leaf[...] = leaf[...] + 0.1 * jax.random.normal(jax.random.key(1), leaf[...].shape)
  size = {"width": 4, "height": 4, "num_frames": 1}

  def sample(scale, *prompts, **kwargs):
    requests = [Request(prompt=p, index=0, **size, **kwargs) for p in prompts]
    return generate_float(
      net,
      requests,
      config=SampleConfig(num_inference_steps=2, guidance_scale=scale),
      diffusion=ObjectiveConfig(),
      tokenize=Embedder(NAME, WIDTH),
      spec=dataclasses.replace(SPEC, channels=12),
      patch=(1, 2, 2),
    )

  first, other = sample(1.0, "a b c", "d e")
  (again,) = sample(1.0, "a b c")
  (guided,) = sample(3.0, "a b c")
  (led_away,) = sample(3.0, "a b c", negative_prompt="d e")
  np.testing.assert_allclose(first, again, atol=1e-4)
  assert all(np.abs(first - x).max() > 1e-3 for x in (other, guided))
  assert np.abs(guided - led_away).max() > 1e-3
  (none,) = sample(1.0, "")
  (free,) = sample(0.0, "a b c")
  np.testing.assert_allclose(none, free, atol=1e-4)
