import json
import os
import pickle

import numpy as np
import pytest

from data_pipelines import index
from data_pipelines.pipeline import DataConfig, build_source
from data_pipelines.sources import registry
from data_pipelines.video_io import UnreadableError
from sora_jax.packing.geometry import ClipSpec
from tests import media

CLIP = ClipSpec(4, 32, 48, 12.0)


@pytest.fixture
def folder(tmp_path):
  """Two captioned videos (one in a sub-folder, one oddly named), an image without a caption, and litter."""
  root = tmp_path / "data"
  (root / "sub").mkdir(parents=True)
  media.make_clip(root / "sub" / "видео é 🎬.mp4", 6)
  (root / "sub" / "видео é 🎬.txt").write_text("Une vidéo\n d'été ", encoding="utf-8")
  media.make_clip(root / "b.mkv", 5)
  (root / "b.txt").write_text("\ufeffa grey box", encoding="utf-8")
  media.make_image(root / "c.png")
  (root / "empty.mp4").write_bytes(b"")
  (root / "notes.md").write_text("no media")
  return root


def build(source, **changes):
  return build_source(DataConfig(source=str(source), **changes))


def names(source) -> list[str]:
  return [source.info(i).name for i in range(len(source))]


def test_a_folder_with_captions_beside_the_files(folder):
  source = build(folder)
  assert names(source) == ["b.mkv", "c.png", "sub/видео é 🎬.mp4"]
  assert [source.info(i).captions for i in range(3)] == [("a grey box",), (), ("Une vidéo d'été",)]
  assert [source.info(i).num_frames for i in range(3)] == [5, 1, 6]
  assert source.rejects == [("notes.md", "not_media"), ("empty.mp4", "empty: 0 bytes")]
  assert source.load(0, CLIP).shape == (4, 32, 48, 3)
  again = pickle.loads(pickle.dumps(source))
  assert np.array_equal(again.load(2, CLIP), source.load(2, CLIP))
  assert again.fingerprint() == source.fingerprint()


def test_a_folder_without_any_caption_is_refused_unless_declared(folder):
  for text in folder.rglob("*.txt"):
    text.unlink()
  with pytest.raises(ValueError, match="none of the 4 media files .* has a caption.*captions_optional"):
    build(folder)
  assert len(build(folder, captions_optional=True)) == 3


def test_missing_and_empty_folders_are_refused(tmp_path):
  with pytest.raises(ValueError, match="neither a file or folder nor one of .*synthetic"):
    build(tmp_path / "gone")
  (tmp_path / "a.md").write_text("x")
  with pytest.raises(ValueError, match=r"holds no video or image \(1 other files\)"):
    build(tmp_path)
  with pytest.raises(ValueError, match="no folder and no .csv"):
    build(tmp_path / "a.md")
  (tmp_path / "a.mp4").write_bytes(b"")
  with pytest.raises(ValueError, match="no sample can be used .*1 empty"):
    build(tmp_path, captions_optional=True)


def test_sizes_that_cannot_be_used_are_named(tmp_path):
  media.make_image(tmp_path / "tiny.png", (16, 16))
  media.make_image(tmp_path / "strip.png", (640, 40))
  media.make_image(tmp_path / "good.png")
  source = build(tmp_path, captions_optional=True)
  assert names(source) == ["good.png"]
  assert [r.split(":")[0] for _, r in source.rejects] == ["aspect", "too_small"]


def test_links_out_of_the_folder_are_refused_unless_allowed(folder, tmp_path):
  outside = media.make_clip(tmp_path / "outside.mp4", 3)
  (folder / "link.mp4").symlink_to(outside)
  (folder / "secret.txt").symlink_to(tmp_path / "outside.mp4")
  media.make_image(folder / "secret.png")
  source = build(folder)
  assert {n for n, r in source.rejects if r.startswith("outside_root")} == {"link.mp4", "secret.png"}
  assert "link.mp4" in names(build(folder, allow_outside_root=True))


def write_manifest(folder, name, records):
  path = folder / name
  if name.endswith(".csv"):
    lines = [",".join(records[0])] + [",".join(f'"{v}"' for v in r.values()) for r in records]
    path.write_text("\n".join(lines), encoding="utf-8")
  else:
    text = json.dumps(records) if name.endswith(".json") else "\n".join(map(json.dumps, records))
    path.write_text(text, encoding="utf-8")
  return path


@pytest.mark.parametrize("name", ["metadata.csv", "list.jsonl", "list.json"])
@pytest.mark.parametrize("media_column", ["path", "file_name", "video", "image", "file"])
@pytest.mark.parametrize("caption_column", ["text", "caption", "vila_caption"])
def test_manifests_by_their_columns(folder, name, media_column, caption_column):
  records = [
    {media_column: "b.mkv", caption_column: "one, two"},
    {media_column: str(folder / "c.png"), caption_column: "three"},
    {media_column: "gone.mp4", caption_column: "four"},
  ]
  source = build(write_manifest(folder, name, records))
  assert names(source) == ["b.mkv", "c.png"]
  assert [source.info(i).captions for i in range(2)] == [("one, two",), ("three",)]
  assert source.rejects == [("gone.mp4", "missing")]


def test_a_manifest_in_the_folder_is_found_and_several_captions_are_kept(folder):
  write_manifest(folder, "metadata.jsonl", [{"video_path": "b.mkv", "cap": ["one", " two "]}])
  assert build(folder).info(0).captions == ("one", "two")


def test_a_space_after_the_comma_and_a_data_root(folder, tmp_path):
  path = tmp_path / "list.csv"
  path.write_text("path, caption\nb.mkv, a box\n")
  source = build(path, data_root=str(folder))
  assert names(source) == ["b.mkv"] and source.info(0).captions == ("a box",)


def test_wrong_columns_are_told_with_those_found(folder):
  path = write_manifest(folder, "list.csv", [{"clip": "b.mkv", "words": "x"}])
  with pytest.raises(ValueError, match=r"list.csv has no media column \(one of .*\); it has clip, words"):
    build(path)
  with pytest.raises(ValueError, match="has no caption column"):
    build(path, media_column="clip")
  with pytest.raises(ValueError, match="has no column 'klip'; it has clip, words: set data.media_column"):
    build(path, media_column="klip")
  assert build(path, media_column="clip", caption_column="words").info(0).captions == ("x",)


def test_broken_manifests_are_told_by_line(folder):
  path = folder / "list.jsonl"
  path.write_text('{"path": "b.mkv", "text": "x"}\n{oops\n')
  with pytest.raises(ValueError, match="list.jsonl, line 2"):
    build(path)
  path.write_text("")
  with pytest.raises(ValueError, match="has no records"):
    build(path)


def test_paths_out_of_the_data_root_are_refused_unless_allowed(folder, tmp_path):
  media.make_clip(tmp_path / "outside.mp4", 3)
  records = [{"path": p, "text": "x"} for p in ("b.mkv", "../outside.mp4", str(tmp_path / "outside.mp4"))]
  path = write_manifest(folder, "list.csv", records)
  source = build(path)
  assert names(source) == ["b.mkv"]
  assert [r.split(":")[0] for _, r in source.rejects] == ["outside_root"] * 2
  assert len(build(path, allow_outside_root=True)) == 3


def test_the_index_is_kept_and_notices_changes(folder, monkeypatch):
  probed = []
  probe = index._probe
  monkeypatch.setattr(index, "_probe", lambda path, limit: probed.append(path) or probe(path, limit))
  first = build(folder)
  assert len(probed) == 4 and (folder / ".sora_jax_index.jsonl").exists()
  assert build(folder).fingerprint() == first.fingerprint() and len(probed) == 4
  assert build(folder).rejects == first.rejects
  media.make_clip(folder / "b.mkv", 7)
  assert build(folder).info(0).num_frames == 7 and len(probed) == 5
  with open(folder / ".sora_jax_index.jsonl", "a") as f:
    f.write('{"key": 1, "in')  # a write cut off
  assert len(build(folder)) == 3 and len(probed) == 5


def test_a_read_only_folder_is_left_alone_also_by_root(folder, monkeypatch, tmp_path):
  monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "cache"))
  folder.chmod(0o555)
  try:
    first = build(folder)
    assert not (folder / ".sora_jax_index.jsonl").exists()
    assert len(list((tmp_path / "cache").rglob("*.jsonl"))) == 1
    monkeypatch.setattr(index, "_probe", None)  # all is kept
    assert build(folder).fingerprint() == first.fingerprint()
  finally:
    folder.chmod(0o755)


def test_a_source_of_ones_own(folder, monkeypatch):
  monkeypatch.setattr(registry, "_factories", dict(registry._factories))
  registry.register("mine")(lambda config: build(folder, captions_optional=config.captions_optional))
  assert len(build("mine")) == 3
  with pytest.raises(ValueError, match="two sources are registered as 'mine'"):
    registry.register("mine")(lambda config: None)


def test_a_file_that_goes_away_is_unreadable(folder):
  source = build(folder)
  os.remove(folder / "b.mkv")
  with pytest.raises(UnreadableError, match="missing"):
    source.load(0, CLIP)


EXPECTED_REJECTS = {
  "README.md": "not_media",
  "audio_only.mp4": "no_video",
  "html_named.mp4": "unreadable",
  "image_1x1.png": "too_small",
  "tiny_16x16.mp4": "too_small",
  "truncated_no_moov.mp4": "unreadable",
  "wide_1280x80.mp4": "aspect",
  "zero_byte.mp4": "empty",
}


def test_awkward_files_are_used_or_named():
  root = media.real_data("awkward")
  source = build(root, captions_optional=True)
  assert {n: r.split(":")[0] for n, r in source.rejects} == EXPECTED_REJECTS
  assert len(source) + len(source.rejects) == len(os.listdir(root))
  sizes = {i.name: (i.num_frames, i.height, i.width) for i in map(source.info, range(len(source)))}
  assert sizes["rotated90.mp4"] == (50, 480, 270)
  assert sizes["anamorphic_sar_64_45.mp4"] == (60, 576, 1024)
  assert sizes["edit_list_cut_copy.mp4"][0] == 91
  assert sizes["truncated_faststart.mp4"][0] == 73
  assert sizes["corrupt_middle.mp4"][0] == 58


def test_real_manifest_reads_whole():
  source = build(media.real_data("real") / "metadata.csv")
  assert len(source) == 153 and not source.rejects
