"""Several captions of a sample: from which columns, and how often each is drawn."""

import collections
import dataclasses
import json
import math

import pytest

from data_pipelines.pipeline import DataConfig, Pipeline, batch_spec
from sora_jax.conditioning import tokenizer
from tests.datasets import build, write_csv, write_json

LONG, SHORT = "a grey box before a long description", "a box"


def drawn(source, epochs=400, split="train", **changes) -> list[collections.Counter]:
  """How often each caption of each sample comes up."""
  config = DataConfig(patch=(2, 8, 8), row_tokens=400, **changes)
  loader = Pipeline(source, config, batch_spec(config), str.split, split=split).loader
  return [
    collections.Counter(loader.caption(source.info(i), e) for e in range(epochs)) for i in range(len(source))
  ]


def test_columns_together_and_their_weights(root):
  records = [{"path": "a.mp4", "long": LONG, "short": SHORT}, {"path": "b.mp4", "long": "", "short": "one"}]
  write_csv(root / "meta.csv", records)
  source = build(root / "meta.csv", caption_column="long, short")
  assert source.info(0).captions == (LONG, SHORT) and source.info(1).captions == ("", "one")
  first, second = drawn(source, caption_weights=(0.8, 0.2))
  assert 0.74 < first[LONG] / 400 < 0.86 and first.total() == 400 and set(first) == {LONG, SHORT}
  assert second == {"one": 400}
  assert 0.4 < drawn(source)[0][SHORT] / 400 < 0.6
  assert drawn(source, caption_weights=(0, 0, 1))[0][LONG] > 150  # none of a place that is not there
  with pytest.raises(ValueError, match=r"meta.csv has no column medium; it has path, long, short"):
    build(root / "meta.csv", caption_column="long,medium")


def test_lists_of_captions(root):
  write_json(root / "list.json", [{"path": "a.mp4", "cap": [LONG, SHORT]}, {"path": "b.mp4", "cap": "one"}])
  first, second = drawn(build(root / "list.json"), caption_weights=(0.0, 1.0))
  assert first == {SHORT: 400} and second == {"one": 400}


def test_captions_by_name_and_none(root):
  both = {"long": LONG, "short": SHORT}
  write_json(root / "list.json", [{"path": "a.mp4", "cap": both}, {"path": "b.mp4", "cap": math.nan}])
  assert [build(root / "list.json").info(i).captions for i in range(2)] == [(LONG, SHORT), ()]


def test_captions_beside_files_in_columns(root):
  for name in ("a", "b"):
    (root / f"{name}.json").write_text(json.dumps({"long": LONG, "short": SHORT}))
  assert build(root, caption_column="long,short").info(1).captions == (LONG, SHORT)


def test_held_out_samples_show_their_first_caption(root):
  write_json(root / "list.json", [{"path": f"{n}.mp4", "cap": ["", LONG, SHORT]} for n in "ab"])
  config = DataConfig(patch=(2, 8, 8), row_tokens=400, num_eval=1, caption_weights=(0, 0, 1))
  source = build(root / "list.json")
  pipeline = Pipeline(source, config, batch_spec(config), str.split, split="eval")
  assert pipeline.loader.caption(source.info(0), 3) == LONG


def test_times_in_the_source_are_kept(root):
  records = [{"path": "a.mp4", "cap": "x", "cut": [3, 5]}, {"path": "b.mp4", "cap": "y"}]
  write_json(root / "list.json", records)
  source = build(root / "list.json")
  assert [source.info(i).start_s for i in range(2)] == [0.25, 0.0]
  assert dataclasses.asdict(source.info(0))["name"] == "a.mp4#3-5"


def test_the_report_shows_some(root):
  """Whoever took the wrong column sees it there."""
  write_csv(root / "meta.csv", [{"path": f"{n}.mp4", "text": t} for n, t in (("a", LONG * 9), ("b", SHORT))])
  config = DataConfig(patch=(2, 8, 8), row_tokens=400)
  pipeline = Pipeline(build(root / "meta.csv"), config, batch_spec(config), str.split)
  (line,) = [line for line in str(pipeline.report()).splitlines() if line.startswith("captions ")]
  assert line == f"captions    {(LONG * 9)[:57]}... | {SHORT}"
  assert pipeline.report().as_dict()["captions"] == [LONG * 9, SHORT]


def test_the_report_counts_captions_that_are_cut(root):
  write_csv(root / "meta.csv", [{"path": f"{n}.mp4", "text": t} for n, t in (("a", LONG), ("b", SHORT))])
  config = DataConfig(patch=(2, 8, 8), row_tokens=400)
  for most, cut in ((6, 1), (99, 0)):
    vocabulary = tokenizer.train([LONG, SHORT], vocab_size=400, max_tokens=most)
    report = Pipeline(build(root / "meta.csv"), config, batch_spec(config), vocabulary).report()
    assert report.captions_full == cut
    assert ("1 captions reach text.max_tokens=6: what is beyond" in str(report)) == bool(cut)
