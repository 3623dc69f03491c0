"""Sets of TensorFlow Datasets, written here without TensorFlow, read as a plain folder reads."""

import sys

import numpy as np
import pytest

from data_pipelines.pipeline import DataConfig, build_source
from sora_jax.packing.geometry import ClipSpec
from tests.datasets import TEXTS, clip_bytes

tfds = pytest.importorskip("tensorflow_datasets")
CLIP = ClipSpec(4, 48, 64, 12.0)


def write(folder, name, features, examples):
  """A prepared set, by the writer that TFDS itself uses."""

  class Builder(tfds.core.GeneratorBasedBuilder, skip_registration=True):
    VERSION = tfds.core.Version("1.0.0")
    code_path = None  # else looked for with a package that may be absent

    def _info(self):
      return tfds.core.DatasetInfo(builder=self, features=tfds.features.FeaturesDict(features))

    def _split_generators(self, dl_manager):
      return {"train": self._generate_examples()}

    def _generate_examples(self):
      yield from enumerate(examples)

  Builder.name = name
  builder = Builder(data_dir=str(folder), file_format="array_record")
  builder.download_and_prepare()


@pytest.fixture(scope="module")
def root(tmp_path_factory, plain):
  folder = tmp_path_factory.mktemp("tfds")
  text = tfds.features.Text()
  files = [{"video": clip_bytes(plain, n), "caption": t} for n, t in TEXTS.items()]
  write(folder, "of_files", {"video": text, "caption": text}, files)
  frames = [
    {"frames": plain.load(i, ClipSpec(6, 48, 64, 12.0)), "text": t, "fps": np.float32(12)}
    for i, t in enumerate(TEXTS.values())
  ]
  shape = tfds.features.Tensor(shape=(None, 48, 64, 3), dtype=np.uint8, encoding="bytes")
  write(folder, "of_frames", {"frames": shape, "text": text, "fps": tfds.features.Scalar(np.float32)}, frames)
  return folder


def build(root, name, **changes):
  return build_source(DataConfig(source=f"tfds:{name}/train", data_root=str(root), **changes))


def test_files_in_a_set_read_as_in_a_folder(root, plain):
  source = build(root, "of_files")
  assert [source.info(i).captions for i in range(2)] == [(t,) for t in TEXTS.values()]
  for i in range(2):
    got, want = source.info(i), plain.info(i)
    assert (got.num_frames, got.height, got.width, got.fps) == (
      want.num_frames,
      want.height,
      want.width,
      want.fps,
    )
    np.testing.assert_array_equal(source.load(i, CLIP, 0.1), plain.load(i, CLIP, 0.1))


def test_frames_in_a_set_and_no_tensorflow(root, plain):
  source = build(root, "of_frames")
  np.testing.assert_array_equal(source.load(0, CLIP, 1 / 12), plain.load(0, CLIP, 1 / 12))
  assert "tensorflow" not in sys.modules


def test_what_is_missing_is_named(root):
  with pytest.raises(ValueError, match="tfds:gone/train.*cannot be read"):
    build(root, "gone")
  with pytest.raises(ValueError, match="is not tfds:NAME/SPLIT"):
    build_source(DataConfig(source="tfds:mine"))
  with pytest.raises(ValueError, match="has no feature clips; it has .*caption.*set data.media_column"):
    build(root, "of_files", media_column="clips")
  with pytest.raises(ValueError, match=r"has no caption \(a feature words\)"):
    build(root, "of_files", caption_column="words")
