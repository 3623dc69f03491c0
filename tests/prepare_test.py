"""Stages of the preparation: what is kept, what is dropped and why, what is written."""

import dataclasses
import json

import av
import numpy as np
import pytest
from absl import flags

from data_pipelines.prepare import __main__ as program
from data_pipelines.prepare import codecs, dedup, plan, shots, signals
from data_pipelines.prepare.config import PrepareConfig
from data_pipelines.sources.shards import ShardSource
from tests import media
from tests.prepared import SMALL, contents, inline, make_set, moving, run_inline, write_clip

HOOKS = """
import numpy as np

def caption(frames, captions):
  return [f"{len(frames)} frames", *captions]

def score(frames, captions):
  return float(frames.mean())

def nothing(frames, captions):
  pass

def fails(frames, captions):
  raise RuntimeError("no weights")

class Pool:
  hash, factors = "pool-v1", (4, 8, 8)
  def encode(self, frames):
    t, h, w, c = frames.shape
    first = frames[:1].reshape(1, h // 8, 8, w // 8, 8, c).mean((2, 4))
    rest = frames[1:].reshape((t - 1) // 4, 4, h // 8, 8, w // 8, 8, c).mean((1, 3, 5))
    return np.concatenate([first, rest]) / 127.5 - 1

class Words:
  hash = "words-v1"
  def __call__(self, text):
    return np.array([[len(w), ord(w[0])] for w in text.split()] or [[0, 0]], np.float32)
"""


@pytest.fixture
def hooks(tmp_path, monkeypatch):
  (tmp_path / "my_hooks.py").write_text(HOOKS)
  monkeypatch.syspath_prepend(str(tmp_path))


def rules(outcome) -> dict[str, str]:
  return {d["name"]: d["rule"] for d in outcome.dropped}


def test_each_rule_drops_its_own(tmp_path):
  data = tmp_path / "data"
  data.mkdir()
  good = moving(1)
  write_clip(data / "good.mp4", good)
  write_clip(data / "later_copy.mp4", good, size=(96, 72))
  write_clip(data / "other.mp4", moving(2))
  write_clip(data / "black.mp4", np.zeros_like(good))
  write_clip(data / "flat.mp4", np.full_like(good, 90))
  write_clip(data / "still.mp4", np.repeat(good[:1], 24, axis=0))
  write_clip(data / "short.mp4", moving(3, frames=3))
  write_clip(data / "slow.mp4", moving(4), fps=2)
  write_clip(data / "bars.mp4", np.pad(moving(5), ((0, 0), (16, 16), (0, 0), (0, 0))))
  write_clip(data / "thin.mp4", moving(6, size=(160, 32)))
  write_clip(data / "long.mp4", moving(7, frames=60))
  write_clip(data / "tiny.mp4", moving(8, size=(24, 24)))
  media.make_clip(data / "empty.mp4").write_bytes(b"")
  outcome = run_inline(data, tmp_path / "out", {"captions_optional": True}, max_duration=2.0)
  assert rules(outcome) == {
    "later_copy.mp4": "duplicate",
    "black.mp4": "black",
    "flat.mp4": "flat",
    "still.mp4": "static",
    "short.mp4": "too_short",
    "slow.mp4": "fps",
    "thin.mp4": "aspect",
    "tiny.mp4": "small",
    "empty.mp4": "empty",
  }
  kept = [(s.item.name, s.start_s, s.num_frames) for s, _ in outcome.kept]
  assert kept == [
    ("bars.mp4", 0.0, 24),
    ("good.mp4", 0.0, 24),
    ("long.mp4", 0.0, 20),
    ("long.mp4", pytest.approx(20 / 12, abs=1e-5), 20),
    ("long.mp4", pytest.approx(40 / 12, abs=1e-5), 20),
    ("other.mp4", 0.0, 24),
  ]
  top, bottom = outcome.kept[0][0].crop[2:]
  assert 16 <= top <= 19 and 61 <= bottom <= 64
  lines = [json.loads(line) for line in (tmp_path / "out" / "dropped.jsonl").read_text().splitlines()]
  assert {line["name"]: line["rule"] for line in lines} == rules(outcome)
  page = (tmp_path / "out" / "report.html").read_text()
  assert "later_copy.mp4" in page and "data:image/jpeg;base64," in page and page.count("<svg") == 6


def test_stages_left_out_do_nothing(tmp_path):
  data = make_set(tmp_path / "data", clips=1)
  write_clip(data / "black.mp4", np.zeros((24, 48, 64, 3), np.uint8))
  outcome = run_inline(data, tmp_path / "out", stages=("probe",))
  assert len(outcome.kept) == 2 and not outcome.notes and not (tmp_path / "out" / "shards.json").exists()
  run_inline(data, tmp_path / "out", stages=("probe", "write"))
  source = ShardSource(str(tmp_path / "out"))
  assert {(i.num_frames, i.height, i.width) for i in map(source.info, range(2))} == {
    (12, 48, 64),
    (24, 48, 64),
  }


@pytest.mark.parametrize("kind", ["adaptive", "content"])
def test_shots(tmp_path, kind):
  pytest.importorskip("scenedetect")
  data = tmp_path / "data"
  data.mkdir()
  write_clip(data / "two.mp4", np.concatenate([moving(1, 20), 255 - moving(2, 28)]))
  stages = ("probe", "shots", "cut", "filter", "dedup", "resize", "write")
  outcome = run_inline(
    data, tmp_path / "out", {"captions_optional": True}, stages=stages, shot_detector=kind, trim=1 / 12
  )
  assert [(s.start_s, s.num_frames) for s, _ in outcome.kept] == [
    (0.0, 19),
    (pytest.approx(21 / 12, abs=1e-5), 27),
  ]
  source = ShardSource(str(tmp_path / "out"))
  rows = sorted((source.row(i) for i in range(2)), key=lambda row: row["start_s"])
  assert [row["stop_s"] for row in rows] == pytest.approx([19 / 12, 48 / 12])


def test_shots_without_the_extra(tmp_path, monkeypatch):
  monkeypatch.setattr(shots, "AdaptiveDetector", None)
  with pytest.raises(ValueError, match="pip install 'sora_jax\\[prepare\\]'"):
    run_inline(tmp_path, tmp_path / "out", stages=("probe", "shots", "write"))


def test_hooks_make_captions_latents_and_text(tmp_path, hooks):
  data = make_set(tmp_path / "data", clips=3)
  outcome = run_inline(
    data,
    tmp_path / "out",
    stages=(*("probe", "cut", "filter", "caption", "resize"), "encode_latents", "encode_text", "write"),
    caption="my_hooks:caption",
    score="my_hooks:score",
    min_score=1.0,
    latents="my_hooks:Pool",
    text="my_hooks:Words",
    frame_step=4,
  )
  assert all(s.scores["score"] > 1 for s, _ in outcome.kept)
  source = ShardSource(str(tmp_path / "out"), encoder="pool-v1")
  assert (source.encoder_hash, source.text_encoder_hash) == ("pool-v1", "words-v1")
  for i in range(3):
    info, row = source.info(i), source.row(i)
    assert info.num_frames == (row["pixel_frames"] - 1) // 4 + 1 and info.height == row["pixel_height"] // 8
    assert info.captions == (f"{row['pixel_frames']} frames", f"noise number {row['source'][0]}")
    assert info.fps == pytest.approx(12 / 4) and row["tokens"] == info.num_frames * info.height * info.width
    assert source.text(i, 1)[:, 0].tolist() == [5, 6, 1]


def test_hooks_that_are_wrong_say_so(tmp_path, hooks):
  data = make_set(tmp_path / "data", clips=1)
  for change, line in (
    ({"score": "my_hooks:fails"}, "my_hooks:fails fails on 0.mp4: RuntimeError: no weights"),
    ({"score": "my_hooks:nothing"}, "my_hooks:nothing gives None for 0.mp4: a number is needed"),
    (
      {"caption": "my_hooks:nothing", "stages": ("probe", "caption", "write")},
      "gives None for 0.mp4: a text or a list of texts",
    ),
    ({"caption": "my_hooks:gone", "stages": ("probe", "caption", "write")}, "my_hooks has no gone"),
    (
      {"latents": "my_hooks:caption", "stages": ("probe", "encode_latents", "write")},
      "my_hooks:caption has no .hash",
    ),
    ({"latents": "my_hooks:Words", "stages": ("probe", "encode_latents", "write")}, "has no .factors"),
    (
      {"latents": "no_such_module:x", "stages": ("probe", "encode_latents", "write")},
      "cannot import no_such_module",
    ),
  ):
    with pytest.raises(ValueError, match=line.replace(".", r"\.")):
      run_inline(data, tmp_path / "out", **change)


def test_the_plan_is_that_of_the_clips(tmp_path):
  data = make_set(tmp_path / "data", clips=5)
  config = PrepareConfig(stages=("probe", "cut", "resize", "write"), **SMALL)
  outcome = run_inline(data, tmp_path / "out", stages=config.stages)
  samples = [s for s, _ in outcome.kept]
  forward = plan.shards_of({"b": samples}, config, ())
  assert forward == plan.shards_of({"b": samples[::-1]}, config, ())
  assert [len(s.samples) for s in forward] == [1, 2, 2]
  renumbered = [
    dataclasses.replace(s, item=dataclasses.replace(s.item, number=s.item.number + 9)) for s in samples
  ]
  assert [s.mark for s in plan.shards_of({"b": renumbered}, config, ())] == [s.mark for s in forward]
  coded = dataclasses.replace(config, codec="raw")
  assert all(a.mark != b.mark for a, b in zip(forward, plan.shards_of({"b": samples}, coded, ())))


@pytest.mark.parametrize(
  "size,bucket",
  [((480, 640), (224, 288)), ((720, 1280), (192, 336)), ((1280, 720), (336, 192)), ((300, 300), (256, 256))],
)
def test_buckets(size, bucket):
  assert plan.fit_bucket(*size, PrepareConfig(stages=("probe",))) == bucket


def test_larger_buckets_where_the_clip_has_the_pixels():
  config = PrepareConfig(stages=("probe",), resolutions=(64, 128, 512))
  assert plan.fit_bucket(700, 700, config) == (512, 512)
  assert plan.fit_bucket(200, 200, config) == (128, 128)
  with pytest.raises(plan.UnfitError):
    plan.fit_bucket(40, 40, config)


def test_near_hashes_are_all_found():
  rng = np.random.default_rng(0)
  base = rng.integers(0, 2**63, 40, np.int64)
  marks = []
  for k in range(400):
    flips = rng.choice(64, int(rng.integers(0, 12)), replace=False)
    marks.append(int(base[k % 40]) ^ sum(1 << int(b) for b in flips))
  clips = [{"hashes": [f"{m:016x}"] * 3, "cells": "80" * 1296} for m in marks]
  found, kept = dedup.duplicates(clips, 7, 24.0), []
  for i, mark in enumerate(marks):
    near = next((j for j in kept if (marks[j] ^ mark).bit_count() <= 7), None)
    assert found.get(i) == near
    if near is None:
      kept.append(i)
  assert 40 < len(kept) < 400


def test_takes_of_one_scene_are_no_duplicates():
  """Same hash, since the scene is the same; something small in it differs."""
  one = np.tile(np.linspace(20, 220, 96).astype(np.uint8)[:, None], (24, 72, 1, 3))
  other = one.copy()
  other[:, 30:42, 40:56] = 255 - other[:, 30:42, 40:56]
  clips = []
  for video in (one, other, np.clip(one.astype(int) + 3, 0, 255).astype(np.uint8)):
    collector = signals.Collector()
    for frame in video:
      collector.add(frame)
    marks, cells = signals.hashes(collector.signals())
    clips.append({"hashes": marks, "cells": cells})
  clips[1]["hashes"] = clips[0]["hashes"]
  assert dedup.duplicates(clips, 5, 24.0) == {2: 0}


def test_other_settings_write_anew_and_clear_up(tmp_path):
  data, out = make_set(tmp_path / "data", clips=4), tmp_path / "out"
  run_inline(data, out)
  first = contents(out)
  run_inline(data, out, resolutions=(48,))
  assert any("h0032_w0048" in k for k in first) and not any("h0032_w0048" in k for k in contents(out))
  run_inline(data, out)
  assert contents(out) == first
  (data / "3.mp4").unlink()
  run_inline(data, out)
  assert len(ShardSource(str(out))) == 3


def test_finished_shards_are_not_redone(tmp_path):
  data, out = make_set(tmp_path / "data", clips=4), tmp_path / "out"
  run_inline(data, out)
  times = {p: p.stat().st_mtime_ns for p in out.rglob("*.array_record")}
  index = (out / "index.parquet").stat().st_mtime_ns
  run_inline(data, out)
  assert times == {p: p.stat().st_mtime_ns for p in out.rglob("*.array_record")}
  assert index == (out / "index.parquet").stat().st_mtime_ns
  before, gone = contents(out), next(iter(times))
  gone.write_bytes(gone.read_bytes()[:100])  # its size tells
  run_inline(data, out)
  assert contents(out) == before


def test_any_source_can_be_prepared(tmp_path):
  changes = {"resolutions": (16,), "min_motion": 0.0, "dedup_cell": 0.0}
  outcome = run_inline("synthetic", tmp_path / "out", {"num_samples": 5}, **changes)
  assert outcome.inputs == 5 and len(outcome.kept) + len(outcome.dropped) == 5
  again = run_inline(tmp_path / "out", tmp_path / "twice", **changes)
  assert again.inputs == len(outcome.kept)


@pytest.mark.parametrize(
  "change,line",
  [
    ({"stages": ("probe", "rest")}, "no stage rest; there are probe, shots"),
    ({"stages": ("write",)}, "probe cannot be left out"),
    ({"stages": ("probe", "caption")}, "caption needs --caption=module:function"),
    ({"stages": ("probe",), "text": "a:b"}, "--text is given and --stages lacks encode_text"),
    ({"min_score": 2.0}, "--min_score=2 needs --score=module:function"),
    ({"score": "a:b", "stages": ("probe",)}, "--score is given and --stages lacks filter"),
    ({"score": "a.b"}, "--score=a.b is no module:function"),
    ({"borders": "cut"}, "--borders=cut is none of crop, drop, keep"),
    ({"codec": "png"}, "--codec=png is none of jpeg, h264, raw"),
    ({"min_duration": 2.0, "max_duration": 3.0}, "is below twice"),
    ({"dedup_distance": 9}, "is not between 0 and 7"),
    ({"durations": (9, 17)}, "lacks 1"),
    ({"aspects": ("16/9",)}, "'16/9' is no width:height"),
    ({"resolutions": ()}, "is no list of numbers above 0"),
  ],
)
def test_wrong_settings_are_one_line(change, line):
  with pytest.raises(ValueError, match=line) as e:
    PrepareConfig(**change)
  assert "\n" not in str(e.value)


def test_nothing_left_is_an_error_with_a_report(tmp_path):
  data = tmp_path / "data"
  data.mkdir()
  write_clip(data / "black.mp4", np.zeros((24, 48, 64, 3), np.uint8))
  with pytest.raises(ValueError, match=r"no clip of 1 files is left \(1 black\)"):
    run_inline(data, tmp_path / "out", {"captions_optional": True})
  assert "black" in (tmp_path / "out" / "report.html").read_text()


def test_what_is_read_is_never_written_over(tmp_path, hooks):
  pixels, latents = tmp_path / "pixels", tmp_path / "latents"
  run_inline(make_set(tmp_path / "data", clips=1), pixels)
  whole = contents(pixels)
  for source, out in ((pixels, pixels), (f"{pixels}/", tmp_path / "data" / ".." / "pixels")):
    with pytest.raises(ValueError, match="is what is read: what is written would take its place"):
      run_inline(source, out, durations=(1,))
  assert contents(pixels) == whole
  stages = ("probe", "cut", "resize", "encode_latents", "write")
  run_inline(tmp_path / "data", latents, stages=stages, latents="my_hooks:Pool", frame_step=4)
  with pytest.raises(
    ValueError, match="latents holds latents of encoder pool-v1: only pixels can be prepared"
  ):
    run_inline(latents, tmp_path / "again")


def test_two_runs_do_not_share_an_output(tmp_path):
  data, out = make_set(tmp_path / "data", clips=1), tmp_path / "out"

  def meanwhile(todo, job, label):
    with pytest.raises(ValueError, match="another run is writing to"):
      run_inline(data, out)
    inline(todo, job, label)

  run_inline_with = dataclasses.replace(PrepareConfig(stages=("probe", "write"), **SMALL))
  program.prepare(program.DataConfig(source=str(data), min_size=16), run_inline_with, out, meanwhile)


def test_flags_reach_the_settings(tmp_path, capsys):
  values, defined = flags.FlagValues(), program.FLAGS
  program.FLAGS = values
  try:
    with pytest.MonkeyPatch.context() as patch:
      for kind in ("string", "integer", "float", "bool", "list", "enum"):
        make = getattr(flags, f"DEFINE_{kind}")
        patch.setattr(
          program.flags, f"DEFINE_{kind}", lambda *a, make=make, **k: make(*a, flag_values=values, **k)
        )
      program.define_flags()
    data = make_set(tmp_path / "data", clips=2)
    out = f"--output={tmp_path / 'out'}"
    values(["prepare", f"--input={data}", out, "--resolutions=32,48", "--stages=probe,resize", "--workers=1"])
    assert program.main(["prepare"]) == 0
    assert "kept     2 clips" in capsys.readouterr().out
    values(["prepare", f"--input={data}", out, "--resolutions=x"])
    assert program.main(["prepare"]) == 2
    assert capsys.readouterr().err == "error: --resolutions=x is no list of numbers\n"
    assert program.main(["prepare", "stray"]) == 2
    capsys.readouterr()
    (tmp_path / "file").touch()
    values(["prepare", f"--input={data}", f"--output={tmp_path / 'file'}", "--resolutions=32"])
    assert program.main(["prepare"]) == 2 and capsys.readouterr().err.count("\n") == 1
  finally:
    program.FLAGS = defined


def test_images_and_videos_lie_in_buckets_of_their_own(tmp_path):
  data = make_set(tmp_path / "data", clips=1)
  image = av.VideoFrame.from_ndarray(moving(9, frames=1)[0], format="rgb24").to_image()
  image.save(data / "a.png")
  (data / "a.txt").write_text("an image")
  run_inline(data, tmp_path / "out")
  source = ShardSource(str(tmp_path / "out"))
  assert {source.row(i)["bucket"] for i in range(2)} == {"t0001_h0032_w0048", "t0009_h0032_w0048"}


def test_codecs_are_compared(tmp_path, capsys):
  data = make_set(tmp_path / "data", clips=2)
  assert codecs.main([f"--input={data}", "--clips=2", "--side=64"]) == 0
  lines = {line.split()[0]: line.split() for line in capsys.readouterr().out.splitlines()[1:5]}
  assert list(lines) == ["files", "jpeg", "h264", "raw"] and lines["raw"][2:4] == ["inf", "0"]
  assert codecs.main([f"--input={tmp_path / 'gone'}"]) == 2
