"""The vocabulary, caption drop and the packed text encoder."""

import pickle

import jax
import jax.numpy as jnp
import ml_collections
import numpy as np
import pytest
from flax import nnx

from data_pipelines.config import DataConfig
from data_pipelines.sources.base import SampleInfo
from sora_jax import train, trained
from sora_jax.conditioning import text, tokenizer
from sora_jax.conditioning.text import TextConfig, TextEncoder
from sora_jax.types import BatchSpec

CAPTIONS = [
  "A red circle moving left",
  "a blue square moving up slowly",
  "a red square on a grey background",
] * 5


@pytest.fixture(scope="module")
def vocabulary():
  return tokenizer.train(CAPTIONS, vocab_size=300, max_tokens=16)


def test_any_text_survives_the_round_trip(vocabulary):
  for caption in ["a red circle", "völlig unbekannt: 视频 🎬", "MiXeD case"]:
    ids = tokenizer.train(CAPTIONS, vocab_size=300, max_tokens=99)(caption)
    assert ids[0] == tokenizer.START_ID
    assert vocabulary.decode(ids).strip() == caption.lower()


def test_vocabulary_is_deterministic_saved_and_picklable(vocabulary, tmp_path):
  again = tokenizer.train(list(CAPTIONS), vocab_size=300, max_tokens=16)
  assert again.json == vocabulary.json
  vocabulary.save(tmp_path / "tokenizer.json")
  loaded = tokenizer.load(tmp_path / "tokenizer.json", max_tokens=16)
  assert loaded(CAPTIONS[0]) == pickle.loads(pickle.dumps(vocabulary))(CAPTIONS[0]) == vocabulary(CAPTIONS[0])


class Captioned:
  """Two captions a sample, and nothing to load."""

  def __len__(self):
    return 3

  def info(self, i):
    captions = (CAPTIONS[i], "The dog's É")
    return SampleInfo(id=i, name=str(i), num_frames=1, height=8, width=8, fps=0.0, captions=captions)


def test_words_of_no_caption_are_known_as_such(tmp_path):
  """The vocabulary itself splits a word that it never saw into pieces, as it does a rare one."""
  settings = ml_collections.ConfigDict({"vocab_size": 300, "max_tokens": 9})
  train.vocabulary(tmp_path, Captioned(), DataConfig(), settings)
  texts = ["A RED e\u0301, moving leftwards", "the dog's cat: leftwards", ""]
  assert trained.unknown_words(tmp_path, texts) == ["leftwards", "cat"]
  assert trained.unknown_words(tmp_path / "elsewhere", texts) == []


def test_long_captions_are_cut_and_small_vocabularies_refused(vocabulary):
  assert len(vocabulary("xyz " * 100)) == 16
  with pytest.raises(ValueError, match="below 259"):
    tokenizer.train(CAPTIONS, vocab_size=100, max_tokens=16)


def test_place_in_segment():
  got = text.place_in_segment(jnp.array([[1, 1, 1, 2, 2, 0, 0], [1, 2, 3, 3, 3, 3, 3]]))
  np.testing.assert_array_equal(got, [[0, 1, 2, 0, 1, 0, 1], [0, 0, 0, 1, 2, 3, 4]])


def packed_batch():
  batch = BatchSpec(rows=1, tokens=4, channels=1, samples=3, text_tokens=9).zeros()
  batch.text_ids_BM[0] = [2, 10, 11, 2, 12, 13, 14, 2, 10]
  batch.text_segment_BM[0] = [1, 1, 1, 2, 2, 2, 2, 3, 3]
  return batch


def test_drop_replaces_the_text_of_its_sample_alone():
  dropped = text.drop_captions(packed_batch(), jnp.array([[False, True, False]]))
  np.testing.assert_array_equal(dropped.text_ids_BM[0], [2, 10, 11, 1, 1, 1, 1, 2, 10])


def test_encoder_keeps_captions_apart():
  encoder = TextEncoder(TextConfig(vocab_size=20, max_tokens=8, width=16, depth=1, heads=2), rngs=nnx.Rngs(0))
  run = jax.jit(lambda b: encoder(b))
  batch = packed_batch()
  text_BMD, pooled_BND = jax.block_until_ready(run(batch))  # before its arrays change under it
  batch.text_ids_BM[0, 3:7] = 5
  other_BMD, other_BND = run(batch)
  same = np.array([1, 1, 1, 0, 0, 0, 0, 1, 1], bool)
  np.testing.assert_array_equal(text_BMD[0, same], other_BMD[0, same])
  assert np.abs(text_BMD[0, ~same] - other_BMD[0, ~same]).max() > 0.1
  np.testing.assert_allclose(pooled_BND[0, 0], text_BMD[0, :3].mean(0), atol=1e-6)
  np.testing.assert_array_equal(pooled_BND[0, [0, 2]], other_BND[0, [0, 2]])


def test_a_loop_over_the_blocks_is_the_blocks_in_turn():
  config = TextConfig(vocab_size=20, max_tokens=8, width=16, depth=3, heads=2)
  encoder = TextEncoder(config, rngs=nnx.Rngs(0))
  segment_BM = jnp.array([[1, 1, 1, 2, 2, 2, 2, 3, 3, 0]])
  x_BMD = jax.random.normal(jax.random.key(0), (1, 10, 16))
  expected = x_BMD
  for block in encoder.blocks:
    expected = block(expected, segment_BM)
  looped = jax.jit(lambda x: encoder._run_blocks(x, segment_BM))
  np.testing.assert_allclose(looped(x_BMD), expected, atol=1e-5)
  assert "scan" in str(jax.make_jaxpr(lambda x: encoder._run_blocks(x, segment_BM))(x_BMD))
