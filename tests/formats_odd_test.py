"""What may be taken for another thing: refused in one line, or read as it is meant."""

import json

import pytest

from tests.datasets import TEXTS, build, put_clips, put_frames, write_json
from tests.formats_test import assert_same, rows


def captions_of(source):
  return [source.info(i).captions for i in range(len(source))]


def test_a_comma_without_quotes_does_not_cut_a_caption_short(root, plain):
  (root / "list.csv").write_text("path, caption\na.mp4, a grey box\nb.mp4, two, boxes\n")
  with pytest.raises(
    ValueError, match=r"list.csv, line 3: more cells than the 2 columns path, caption: .*qu"
  ):
    build(root / "list.csv")
  (root / "list.csv").write_text('path,caption\na.mp4,a grey box,\nb.mp4,"two, boxes", \n')  # empty: no harm
  assert_same(build(root / "list.csv"), plain)


@pytest.mark.parametrize("mark", ["\u2028", "\x0b", "\x85"])
def test_separators_within_a_caption_end_no_line(root, mark):
  (root / "list.csv").write_text(f"path,caption\na.mp4,one{mark}two\nb.mp4,three\n", encoding="utf-8")
  assert captions_of(build(root / "list.csv")) == [("one two",), ("three",)]
  (root / "prompts.txt").write_text(f"one{mark}two\nthree\n", encoding="utf-8")
  (root / "videos.txt").write_text("a.mp4\r\nb.mp4\r\n")
  assert captions_of(build(root / "prompts.txt")) == [("one two",), ("three",)]


@pytest.mark.parametrize("folders", [["videos"], ["train", "test"], ["walking"]])
def test_folders_that_hold_all_are_no_classes(tmp_path, plain, folders):
  for folder in folders:
    put_clips(tmp_path / folder, plain)
  with pytest.raises(ValueError, match="none of the . media files .* has a caption"):
    build(tmp_path)
  assert captions_of(build(tmp_path, format="classes"))[0] == (folders[0] if len(folders) == 1 else "test",)


def test_frames_below_one_folder_have_no_class(tmp_path, plain):
  for folder in ("sky_train/a/a_1", "sky_train/b/b_1"):
    put_frames(tmp_path / "sky" / folder, f"{plain.root}/a.mp4")
  source = build(tmp_path / "sky", captions_optional=True)
  assert source.form == "frames" and captions_of(source) == [(), ()] and source.info(0).label == -1
  with pytest.raises(
    ValueError, match="has a caption: put clip_1.txt .*, set data.format=classes where each"
  ):
    build(tmp_path / "sky")
  assert captions_of(build(tmp_path / "sky" / "sky_train")) == [("a",), ("b",)]


def test_tables_of_splits_are_not_passed_over(tmp_path, plain):
  for split in ("train", "validation"):
    put_clips(tmp_path / split, plain)
    write_json(tmp_path / split / "metadata.jsonl", rows("file_name", "text"), lines=True)
  with pytest.raises(ValueError, match=r"has tables in its folders.*: train/metadata.jsonl, validation"):
    build(tmp_path)
  assert_same(build(tmp_path / "train"), plain)


def test_a_table_that_was_not_seen_is_pointed_at(root, plain):
  write_json(root / "mine.json", rows("path", "text"))
  (root / "a.json").write_text(json.dumps({"caption": ""}))
  with pytest.raises(ValueError, match="has a caption: set data.source to the table there, mine.json, put"):
    build(root)
  assert_same(build(root / "mine.json"), plain)


def test_what_is_no_record_is_named_by_its_place(root):
  records = rows("path", "text")
  write_json(root / "a.jsonl", [*records, ["b.mp4", "a dog"]], lines=True)
  with pytest.raises(ValueError, match=r'a.jsonl, line 3: \["b.mp4", "a dog"\] is no record like {"path'):
    build(root / "a.jsonl")
  write_json(root / "a.json", [*records, "b.mp4"])
  with pytest.raises(ValueError, match=r'a.json, record 3: "b.mp4" is no record like {"path'):
    build(root / "a.json")


@pytest.mark.parametrize("suffix", [".txt", ".caption"])
def test_musubi_toml(tmp_path, plain, suffix):
  put_clips(tmp_path / "clips", plain)
  for name, text in TEXTS.items():
    (tmp_path / "clips" / f"{name}{suffix}").write_text(text)
  head = f'[general]\nresolution = [960, 544]\ncaption_extension = "{suffix}"\nnum_repeats = 1\n\n'
  one = head + '[[datasets]]\nvideo_directory = "clips"\ncache_directory = "/c"\ntarget_frames = [1, 25]\n'
  (tmp_path / "set.toml").write_text(one)
  source = build(tmp_path / "set.toml")
  assert source.form == "toml" and source.info(0).name == "clips/a.mp4"
  assert_same(source, plain)
  assert_same(build(tmp_path / "clips"), plain)
  records = [{"video_path": "clips/a.mp4", "caption": "other"}]
  write_json(tmp_path / "list.jsonl", records, lines=True)
  (tmp_path / "set.toml").write_text(one + '[[datasets]]\nvideo_jsonl_file = "list.jsonl"\n')
  assert captions_of(build(tmp_path / "set.toml"))[2] == ("other",)


def test_diffusion_pipe_toml(tmp_path, plain):
  put_clips(tmp_path / "clips", plain)
  for name, text in TEXTS.items():
    (tmp_path / "clips" / f"{name}.txt").write_text(text)
  (tmp_path / "set.toml").write_text("resolutions = [512]\n[[directory]]\npath = 'clips'\nnum_repeats = 5\n")
  assert_same(build(tmp_path / "set.toml"), plain)


@pytest.mark.parametrize(
  "text, message",
  [
    ("[[datasets]\n", "set.toml is not TOML: "),
    ("[model]\npath = 'x'\n", r"set.toml has no \[\[datasets\]\] .*; it has model"),
    ("[[datasets]]\nclips = 'x'\n", r"set.toml, data set 1 has none of video_directory, .*; it has clips"),
    ("[[datasets]]\nvideo_directory = 'gone'\n", "set.toml, data set 1: video_directory='gone': missing"),
    ("[[datasets]]\nvideo_directory = '..'\n", "set.toml, data set 1: video_directory='..': outside_root"),
    (
      "[[datasets]]\nvideo_jsonl_file = 'l.jsonl'\n",
      "l.jsonl has no caption column .*; it has video_path",
    ),
    ("[[datasets]]\nvideo_directory = '.'\ncaption_extension = '.cap'\n", "'.cap' is none of .txt, .caption"),
  ],
)
def test_a_wrong_toml_is_one_line(root, text, message):
  (root / "l.jsonl").write_text(json.dumps({"video_path": "a.mp4", "x": "y"}))
  (root / "set.toml").write_text(text)
  with pytest.raises(ValueError, match=message) as e:
    build(root / "set.toml")
  assert "\n" not in str(e.value)
