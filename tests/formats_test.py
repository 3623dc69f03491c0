"""Each format of data sets reads to the same samples as a plain folder of the same clips."""

import io
import json
import tarfile

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import pytest
from PIL import Image

from sora_jax.packing.geometry import ClipSpec
from tests import media
from tests.datasets import TEXTS, build, clip_bytes, put_clips, put_frames, tar_of, write_csv, write_json

CLIP = ClipSpec(4, 48, 64, 12.0)
WRONG = {"height": 7, "width": 9, "num_frames": 999, "fps": 1.5, "aspect_ratio": 3.0, "resolution": 63}


def assert_same(source, plain, texts=("a grey box", "two, boxes")):
  assert len(source) == len(plain) == 2 and not source.rejects, source.rejects
  assert [source.info(i).captions for i in range(2)] == [(t,) for t in texts]
  for i in range(2):
    got, want = source.info(i), plain.info(i)
    sizes = (got.num_frames, got.height, got.width, got.fps)
    assert sizes == (want.num_frames, want.height, want.width, want.fps)
    assert np.array_equal(source.load(i, CLIP, 0.1), plain.load(i, CLIP, 0.1))


def rows(media_key, text_key, prefix="", **more):
  return [{media_key: f"{prefix}{n}.mp4", text_key: t, **more} for n, t in TEXTS.items()]


def test_open_sora_csv_and_parquet(root, plain):
  records = rows("path", "text", **WRONG)
  write_csv(root / "meta.csv", records)
  assert_same(build(root / "meta.csv"), plain)
  table = pa.Table.from_pylist([{**r, "video_bytes": b"x"} for r in records])
  pq.write_table(table, root / "whole.parquet")
  assert_same(build(root / "whole.parquet"), plain)
  (root / "foo").mkdir()
  for i, record in enumerate(records):
    pq.write_table(pa.Table.from_pylist([record]), root / "foo" / f"{9 + i}.parquet")
  assert_same(build(root / "foo.parquet"), plain)  # the shards alone
  pq.write_table(table, root / "foo.parquet")
  assert_same(build(root / "foo.parquet"), plain)  # not both
  assert_same(build(root / "foo", data_root=str(root)), plain)


@pytest.mark.parametrize("as_text", [False, True])
def test_cuts_and_crops(root, plain, as_text):
  wrap = json.dumps if as_text else list
  records = [
    {"path": "a.mp4", "cap": "all"},
    {"path": "a.mp4", "cap": ["one", "two"], "cut": wrap([2, 5]), "fps": 99},
    {"path": "b.mp4", "cap": "box", "crop": wrap([0, 32, 0, 40])},
    {"path": "b.mp4", "cap": "single", "cut": wrap([7, 8])},
    {"path": "b.mp4", "cap": "late", "cut": wrap([8, 9])},
    {"path": "b.mp4", "cap": "wide", "crop": wrap([0, 65, 0, 40])},
    {"path": "b.mp4", "cap": "odd", "cut": "soon"},
  ]
  write_json(root / "list.json", records)
  source = build(root / "list.json")
  assert [source.info(i).name for i in range(4)] == ["a.mp4", "a.mp4#2-5", "b.mp4#0,32,0,40", "b.mp4#7-8"]
  assert [source.info(i).num_frames for i in range(4)] == [6, 3, 8, 1]
  assert source.info(1).captions == ("one", "two")
  assert media.grey(source.load(1, ClipSpec(3, 48, 64, 12.0))) == [2, 3, 4]
  assert media.grey(source.load(1, ClipSpec(2, 48, 64, 12.0), 1 / 12)) == [3, 4]
  assert media.grey(source.load(0, ClipSpec(2, 48, 64, 12.0), 1 / 12)) == [1, 2]
  whole = plain.load(1, ClipSpec(8, 48, 64, 12.0))
  assert (source.info(2).height, source.info(2).width) == (40, 32)
  assert np.array_equal(source.load(2, ClipSpec(8, 40, 32, 12.0)), whole[:, :40, :32])
  assert np.array_equal(source.load(3, ClipSpec(1, 48, 64))[0], whole[7])
  assert [reason.split(":")[0] for _, reason in source.rejects] == ["cut", "cut", "crop"]


def test_open_sora_plan(tmp_path, plain):
  put_clips(tmp_path / "clips", plain)
  write_json(tmp_path / "anno.json", rows("path", "cap", resolution={"height": 1, "width": 2}, cut=[0, 999]))
  (tmp_path / "data.txt").write_text("clips,anno.json\n\n")
  source = build(tmp_path)
  assert [source.info(i).name for i in range(2)] == ["clips/a.mp4#0-999", "clips/b.mp4#0-999"]
  assert_same(source, plain)
  (tmp_path / "list.txt").write_text("clips,anno.json\n")
  assert_same(build(tmp_path / "list.txt"), plain)
  (tmp_path / "anno.pkl").write_bytes(b"\x80\x04.")
  (tmp_path / "data.txt").write_text("clips,anno.pkl\n")
  with pytest.raises(ValueError, match=r"anno.pkl is a pickle, which can run any code .*convert"):
    build(tmp_path)
  (tmp_path / "data.txt").write_text("clips\n")
  with pytest.raises(ValueError, match=r"data.txt, line 1: 'clips' is not DATA_ROOT,annotations.json"):
    build(tmp_path)


def test_videos2caption(tmp_path, plain):
  put_clips(tmp_path / "videos", plain)
  write_json(tmp_path / "videos2caption.json", rows("path", "cap"))
  assert_same(build(tmp_path), plain)
  (tmp_path / "merge.txt").write_text("videos,videos2caption.json\n")
  assert_same(build(tmp_path / "merge.txt"), plain)


@pytest.mark.parametrize("texts", ["prompts.txt", "captions.txt", "caption.txt"])
def test_list_files_line_by_line(tmp_path, plain, texts):
  put_clips(tmp_path / "videos", plain)
  (tmp_path / texts).write_text("\n".join(TEXTS.values()) + "\n")
  (tmp_path / "videos.txt").write_text("videos/a.mp4\nvideos/b.mp4\n")
  for path in (tmp_path, tmp_path / texts, tmp_path / "videos.txt"):
    assert_same(build(path), plain)
  (tmp_path / texts).write_text("one\n")
  with pytest.raises(ValueError, match=rf"{texts} has 1 lines and .*videos.txt 2"):
    build(tmp_path)


def test_captions_beside_the_files_as_json(root, plain):
  (root / "a.json").write_text(json.dumps({"caption": TEXTS["a"]}))
  (root / "b.json").write_text(json.dumps({"vila_caption": TEXTS["b"]}))
  assert_same(build(root), plain)
  (root / "b.json").write_text(json.dumps({"words": 1}))
  source = build(root)
  assert source.rejects[0][0] == "b.mp4"
  assert "b.json has no caption column" in source.rejects[0][1] and "it has words" in source.rejects[0][1]


@pytest.mark.parametrize("texts", ["labels", "metas"])
def test_captions_in_a_folder_of_their_own(tmp_path, plain, texts):
  put_clips(tmp_path / "videos", plain)
  (tmp_path / texts).mkdir()
  (tmp_path / "t5_xxl").mkdir()
  (tmp_path / "t5_xxl" / "a.pickle").write_bytes(b"x")
  for name, text in TEXTS.items():
    (tmp_path / texts / f"{name}.txt").write_text(text)
  assert_same(build(tmp_path), plain)


TABLES = [
  ("metadata.csv", "file_name", "text"),  # Hugging Face
  ("metadata.jsonl", "file_name", "caption"),
  ("metadata.csv", "video", "prompt"),  # DiffSynth
  ("videox.json", "file_path", "text"),  # VideoX-Fun
  ("dataset.json", "media_path", "caption"),  # LTX
  ("ltx.csv", "media_path", "caption"),
  ("musubi.jsonl", "video_path", "caption"),
  ("meta.json", "file_name", "vila_caption"),  # NeMo
  ("nemo.jsonl", "video_path", "internvl"),
]


@pytest.mark.parametrize("name, media_key, text_key", TABLES)
def test_tables(root, plain, name, media_key, text_key):
  records = rows(media_key, text_key, type="video", **WRONG)
  write = write_csv if name.endswith(".csv") else write_json
  write(root / name, records, **({"lines": True} if name.endswith("l") else {}))
  assert_same(build(root / name), plain)
  if name in ("metadata.csv", "metadata.jsonl", "dataset.json", "meta.json"):
    assert_same(build(root), plain)
  write(root / name, [{"x" if k == text_key else k: v for k, v in r.items()} for r in records])
  if not name.endswith("l"):
    with pytest.raises(ValueError, match=rf"{name} has no caption column .*text.*; it has {media_key}, x"):
      build(root / name)
  if not name.endswith("l"):
    write(root / name, [{"x" if k == media_key else k: v for k, v in r.items()} for r in records])
    with pytest.raises(ValueError, match=rf"{name} has no media column .*path.*; it has x, {text_key}"):
      build(root / name)


def test_videotuna(root, plain):
  (root / "list.csv").write_text('path, caption\na.mp4, a grey box\nb.mp4, "two, boxes"\n')
  assert_same(build(root / "list.csv"), plain)


def test_nemo_ranges_of_frames(root):
  write_csv(root / "meta.csv", rows("file_name", "vila_caption", start_frame=1, end_frame=4))
  source = build(root / "meta.csv")
  assert [source.info(i).num_frames for i in range(2)] == [3, 3]
  assert media.grey(source.load(0, ClipSpec(3, 48, 64, 12.0))) == [1, 2, 3]


def assert_same_but_colours(source, plain):
  """Another converter from YUV differs by a level or two."""
  for i in range(2):
    got, want = source.info(i), plain.info(i)
    assert (got.num_frames, got.height, got.width, got.fps) == (want.num_frames, 48, 64, 12.0)
    for start in (0.0, 0.1):
      assert np.abs(source.load(i, CLIP, start).astype(int) - plain.load(i, CLIP, start)).max() <= 3


def test_folders_of_frames(tmp_path, plain):
  for name in TEXTS:
    put_frames(tmp_path / "frames" / name, f"{plain.root}/{name}.mp4")
  write_json(
    tmp_path / "musubi.jsonl", [{"video_path": f"frames/{n}", "caption": t} for n, t in TEXTS.items()], True
  )
  source = build(tmp_path / "musubi.jsonl", frame_rate=12)
  assert_same_but_colours(source, plain)
  assert [source.info(i).captions[0] for i in range(2)] == list(TEXTS.values())
  with pytest.raises(ValueError, match="none of the 2 media files .* has a caption: put clip_1.txt beside"):
    build(tmp_path / "frames")
  for name, text in TEXTS.items():
    (tmp_path / "frames" / f"{name}.txt").write_text(text)
  source = build(tmp_path / "frames", frame_rate=12)
  assert source.form == "frames" and source.info(1).captions == (TEXTS["b"],)
  assert_same_but_colours(source, plain)
  lines = [f"frames/{n}/frame_{i + 1}.png" for k, n in enumerate(TEXTS) for i in range(6 + 2 * k)]
  (tmp_path / "train_list.txt").write_text("\n".join(lines))
  assert_same_but_colours(build(tmp_path / "train_list.txt", frame_rate=12), plain)
  Image.new("RGB", (20, 20)).save(tmp_path / "frames" / "a" / "frame_3.png")
  assert build(tmp_path / "frames").rejects[0][1].startswith("frames_differ: frame_3.png is 20x20")


def test_class_folders(tmp_path, plain):
  for folder, name in (("ApplyEyeMakeup", "a"), ("Sky_Diving", "b")):
    (tmp_path / "ucf" / folder).mkdir(parents=True)
    (tmp_path / "ucf" / folder / f"{name}.avi").write_bytes(clip_bytes(plain, name))
  source = build(tmp_path / "ucf")
  assert source.form == "classes" and [source.info(i).label for i in range(2)] == [0, 1]
  assert_same(source, plain, ("apply eye makeup", "sky diving"))
  (tmp_path / "trainlist01.txt").write_text("ucf/ApplyEyeMakeup/a.avi 1\nucf/Sky_Diving/b.avi 2\n")
  source = build(tmp_path / "trainlist01.txt")
  assert [source.info(i).label for i in range(2)] == [1, 2]
  assert_same(source, plain, ("apply eye makeup", "sky diving"))
  with pytest.raises(ValueError, match="none of the 2 media files .* has a caption"):
    build(tmp_path / "ucf", format="folder")
  with pytest.raises(ValueError, match="data.format='ucf' is none of manifest, "):
    build(tmp_path / "ucf", format="ucf")


def put_tar(path, members, form=tarfile.PAX_FORMAT):
  path.write_bytes(tar_of(members, form))


@pytest.mark.parametrize("form", [tarfile.PAX_FORMAT, tarfile.GNU_FORMAT, tarfile.USTAR_FORMAT])
@pytest.mark.parametrize("prefix", ["", "dir/" + "long" * 24 + "/"])
def test_webdataset(tmp_path, plain, form, prefix):
  clips = {n: clip_bytes(plain, n) for n in TEXTS}
  one = [(f"{prefix}a.mp4", clips["a"]), (f"{prefix}a.txt", TEXTS["a"].encode())]
  two = [(f"{prefix}b.json", json.dumps({"caption": TEXTS["b"]}).encode()), (f"{prefix}b.mp4", clips["b"])]
  put_tar(tmp_path / "all.tar", one + two, form)
  assert_same(build(tmp_path / "all.tar"), plain)
  (tmp_path / "shards").mkdir()
  put_tar(tmp_path / "shards" / "9.tar", one, form)
  put_tar(tmp_path / "shards" / "10.tar", two, form)
  assert_same(build(tmp_path / "shards"), plain)


def test_tars_that_are_odd(tmp_path, plain):
  clip = clip_bytes(plain, "a")
  link = tarfile.TarInfo("d.mp4")
  link.type, link.linkname = tarfile.SYMTYPE, "/etc/passwd"
  image = io.BytesIO()
  Image.new("RGB", (64, 48), (9, 99, 199)).save(image, "PNG")
  members = [
    *[("c.mp4", clip), ("c.txt", b"x"), ("../e.mp4", clip), ("/f.mp4", clip), ("d.mp4", link)],
    *[("g.mp4", clip), ("g.json", b'{"words": 1}'), ("h.pth", b"x"), ("i.png", image.getvalue())],
    ("i.txt", b"blue"),
  ]
  put_tar(tmp_path / "a.tar", members)
  source = build(tmp_path / "a.tar")
  assert [source.info(i).name for i in range(len(source))] == ["a.tar/c.mp4", "a.tar/i.png"]
  assert tuple(source.load(1, ClipSpec(1, 48, 64))[0, 0, 0]) == (9, 99, 199)
  reasons = {name.split("/", 1)[1]: reason for name, reason in source.rejects}
  assert {n: r.split(":")[0] for n, r in reasons.items()} == {
    **{"../e.mp4": "unsafe_name", "/f.mp4": "unsafe_name", "d.mp4": "link"},
    **{"g.mp4": "caption_unreadable", "h": "no_media"},
  }
  assert "g.json has no caption column" in reasons["g.mp4"]
  content = (tmp_path / "a.tar").read_bytes()
  (tmp_path / "short.tar").write_bytes(content[: len(clip) // 2])
  with pytest.raises(ValueError, match="short.tar is cut off: its member at byte 0"):
    build(tmp_path / "short.tar")
  (tmp_path / "part.tar").write_bytes(content[: len(clip) + 4000])
  assert build(tmp_path / "part.tar").rejects[0][1].startswith("truncated")
  (tmp_path / "a.tar.gz").write_bytes(b"\x1f\x8b" + bytes(2000))
  with pytest.raises(ValueError, match="a.tar.gz is compressed"):
    build(tmp_path / "a.tar.gz")
  put_tar(tmp_path / "bare.tar", [("c.mp4", clip)])
  with pytest.raises(ValueError, match="none of the 1 media files in .*bare.tar has a caption"):
    build(tmp_path / "bare.tar")


# Every format of tables: (file, media column, caption column). What pair, list, classes and frames say of a
# list that does not fit stands in the tests above.
COLUMNED = {
  "open_sora_csv": ("meta.csv", "path", "text"),
  "open_sora_parquet": ("meta.parquet", "path", "text"),
  "open_sora_parquet_shards": ("foo/0.parquet", "path", "text"),
  "open_sora_plan": ("anno.json", "path", "cap"),
  "videos2caption": ("videos2caption.json", "path", "cap"),
  "hugging_face_csv": ("metadata.csv", "file_name", "text"),
  "hugging_face_jsonl": ("metadata.jsonl", "file_name", "text"),
  "diffsynth_video": ("metadata.csv", "video", "prompt"),
  "diffsynth_image": ("list.csv", "image", "prompt"),
  "videox_fun": ("videox.json", "file_path", "text"),
  "ltx": ("ltx.csv", "media_path", "caption"),
  "ltx_json": ("dataset.json", "media_path", "caption"),
  "musubi": ("musubi.jsonl", "video_path", "caption"),
  "videotuna": ("tuna.tsv", "path", "caption"),
  "nemo": ("meta.json", "file_name", "vila_caption"),
}


@pytest.mark.parametrize("form", COLUMNED)
@pytest.mark.parametrize("lost", ["media", "caption"])
@pytest.mark.parametrize("is_named", [False, True])
def test_a_column_that_is_not_there_is_named_with_its_file(root, form, lost, is_named):
  file, media_key, text_key = COLUMNED[form]
  gone = media_key if lost == "media" else text_key
  records = [{"x" if k == gone else k: v for k, v in r.items()} for r in rows(media_key, text_key)]
  path = root / file
  path.parent.mkdir(exist_ok=True)
  if path.suffix == ".parquet":
    pq.write_table(pa.Table.from_pylist(records), path)
    if form.endswith("shards"):  # the other one is sound
      pq.write_table(pa.Table.from_pylist(rows(media_key, text_key)), path.with_name("1.parquet"))
  elif path.suffix in (".csv", ".tsv"):
    write_csv(path, records, "\t" if path.suffix == ".tsv" else ",")
  else:
    write_json(path, records, lines=path.suffix == ".jsonl")
  if form == "open_sora_plan":
    (root / "data.txt").write_text(".,anno.json\n")
    path = root / "data.txt"
  chosen = {f"{lost}_column": gone} if is_named else {}
  with pytest.raises(ValueError) as e:
    build(path.parent if "/" in file else path, **chosen)
  message = str(e.value)
  assert "\n" not in message and file in message, message
  missing = f"has no column '{gone}'; it has" if is_named else f"has no {lost} column (one of "
  assert missing in message and "; it has " in message and "x" in message.split("; it has ")[1], message
  assert f"data.{lost}_column" in message


@pytest.mark.parametrize("inside", ["folder", "caption_folders", "tar"])
def test_a_column_of_one_sample_is_named_with_its_file(tmp_path, plain, inside):
  wrong, right = json.dumps({"words": "x"}), json.dumps({"caption": "a box"})
  if inside == "tar":
    members = [(f"{n}.{e}", c) for n, t in zip("ab", (wrong, right)) for e, c in
               (("mp4", clip_bytes(plain, n)), ("json", t.encode()))]  # fmt: skip
    put_tar(tmp_path / "all.tar", members)
  else:
    put_clips(tmp_path / ("videos" if inside == "caption_folders" else ""), plain)
    texts = tmp_path / ("metas" if inside == "caption_folders" else "")
    texts.mkdir(exist_ok=True)
    for name, text in zip("ab", (wrong, right)):
      (texts / f"{name}.json").write_text(text)
  source = build(tmp_path)
  assert len(source) == 1
  ((name, reason),) = source.rejects
  assert name.endswith("a.mp4") and "\n" not in reason
  assert "a.json has no caption column (one of " in reason and "; it has words" in reason
