"""No format reads what lies outside the data folder, unless that is allowed."""

import pyarrow as pa
import pyarrow.parquet as pq
import pytest

from tests.datasets import build, put_clips, put_frames, write_json


def leave(kind, root, outside):
  """A data set of kind (form, way) that names outside/a.mp4 and its own b.mp4; gives the path to read."""
  far = {"up": "../outside/a.mp4", "absolute": str(outside / "a.mp4"), "link": "link.mp4"}
  named = far[kind[1]]
  (root / "link.mp4").symlink_to(outside / "a.mp4")
  records = [{"path": named, "text": "x"}, {"path": "b.mp4", "text": "y"}]
  if kind[0] == "parquet":
    pq.write_table(pa.Table.from_pylist(records), root / "list.parquet")
    return root / "list.parquet"
  if kind[0] == "tables":
    write_json(root / "anno.json", records)
    (root / "list.txt").write_text(".,anno.json")
    return root / "list.txt"
  if kind[0] == "pair":
    (root / "prompts.txt").write_text("x\ny")
    (root / "videos.txt").write_text(f"{named}\nb.mp4")
    return root / "videos.txt"
  if kind[0] == "list":
    (root / "train_list.txt").write_text(f"{named}\nsub/b.mp4")
    (root / "sub").mkdir()
    (root / "b.mp4").rename(root / "sub" / "b.mp4")
    return root / "train_list.txt"
  write_json(root / "list.json", records)
  return root / "list.json"


@pytest.mark.parametrize("way", ["up", "absolute", "link"])
@pytest.mark.parametrize("form", ["json", "parquet", "tables", "pair", "list"])
def test_nothing_outside_is_read(tmp_path, plain, form, way):
  put_clips(tmp_path / "data", plain)
  put_clips(tmp_path / "outside", plain)
  path = leave((form, way), tmp_path / "data", tmp_path / "outside")
  source = build(path)
  assert len(source) == 1 and source.info(0).name.endswith("b.mp4")
  assert [reason.split(":")[0] for _, reason in source.rejects] == ["outside_root"]
  assert len(build(path, allow_outside_root=True)) == 2


def test_folders_that_lead_outside(tmp_path, plain):
  put_clips(tmp_path / "out", plain)
  put_frames(tmp_path / "out" / "clip", tmp_path / "out" / "a.mp4")
  (tmp_path / "out" / "a.txt").write_text("secret")
  data = tmp_path / "data"
  put_clips(data / "videos", plain)
  (data / "labels").symlink_to(tmp_path / "out")
  (data / "labels" / "b.txt").write_text("secret")
  with pytest.raises(ValueError, match="2 outside_root"):
    build(data)
  (data / "anno.json").symlink_to(tmp_path / "out" / "a.txt")
  (data / "data.txt").write_text(".,anno.json")
  with pytest.raises(ValueError, match="data.txt, line 1: .*outside_root"):
    build(data)
  (data / "data.txt").unlink()
  (data / "metadata.csv").symlink_to(tmp_path / "out" / "a.txt")
  with pytest.raises(ValueError, match="metadata.csv: outside_root"):
    build(data)
  sky = tmp_path / "sky"
  put_frames(sky / "one", tmp_path / "out" / "a.mp4")
  put_frames(sky / "two", tmp_path / "out" / "a.mp4")
  (sky / "two" / "frame_7.png").symlink_to(tmp_path / "out" / "clip" / "frame_1.png")
  source = build(sky, captions_optional=True)
  assert len(source) == 1 and source.rejects[0][1].startswith("outside_root")


def test_names_no_system_takes(tmp_path, plain):
  root = tmp_path
  put_clips(root, plain)
  write_json(
    root / "l.json", [{"path": p, "text": "x"} for p in ("a\0.mp4", "x" * 5000, "a.mp4", "http://h/a.mp4")]
  )
  source = build(root / "l.json")
  assert len(source) == 1 and [r.split(":")[0] for _, r in source.rejects] == ["missing"] * 3
