"""A folder of files that break pipelines: each is read right, or left out for the right reason."""

import dataclasses

import numpy as np
import pytest

from data_pipelines import video_io
from data_pipelines.video_io import UnreadableError
from tests import media
from tests.prepared import STAGES, run_inline


@dataclasses.dataclass(frozen=True)
class Read:
  """Frames, height, width as displayed, frames a second, mean colour of the middle frame."""

  frames: int
  height: int
  width: int
  fps: float
  color: tuple[int, int, int]
  note: str = ""


# What each file is, and what becomes of it when prepared: "" = kept, else the rule that drops it.
TABLE: dict[str, tuple[Read | str, str]] = {
  "all_black.mp4": (Read(48, 180, 320, 24, (0, 0, 0)), "black"),
  "alpha_vp9.webm": (Read(60, 180, 320, 30, (224, 220, 220)), ""),
  "anamorphic_sar_64_45.mp4": (Read(60, 576, 1024, 30, (151, 104, 67)), ""),
  "anim.gif": (Read(16, 106, 160, 7.96, (145, 91, 59)), ""),
  "audio_only.mp4": ("no_video", "no_video"),
  "av1.mp4": (Read(90, 360, 640, 29.97, (191, 180, 162)), ""),
  "corrupt_middle.mp4": (Read(58, 270, 480, 29.97, (173, 141, 123), "truncated: 58"), ""),
  "corrupted_decord.mp4": (Read(28, 720, 1280, 10, (122, 126, 127), "truncated: 28"), ""),
  "cover_art_stream.mp4": (Read(60, 270, 480, 29.97, (147, 146, 127)), ""),
  "edit_list_cut_copy.mp4": (Read(91, 720, 1280, 29.014, (190, 178, 159)), ""),
  "fps_1.mp4": (Read(8, 270, 480, 1, (135, 150, 170)), "fps"),
  "fps_120.mp4": (Read(364, 256, 256, 120, (182, 188, 191)), ""),
  "fps_23976.mp4": (Read(72, 270, 480, 23.976, (91, 107, 99)), ""),
  "full_range_bt709.mp4": (Read(30, 270, 480, 30, (123, 127, 125)), ""),
  "hdr10_hevc_10bit.mp4": (Read(60, 360, 640, 29.97, (137, 83, 32)), ""),
  "html_named.mp4": ("unreadable", "unreadable"),
  "image_1x1.png": (Read(1, 1, 1, 0, (3, 4, 5)), "too_small"),
  "image_cmyk.jpg": (Read(1, 384, 256, 0, (129, 135, 126)), ""),
  "image_exif_rotate6.jpg": (Read(1, 384, 256, 0, (130, 134, 126)), "duplicate"),  # of image_cmyk.jpg
  "image_gray16.png": (Read(1, 128, 256, 0, (127, 127, 127)), ""),
  "image_rgba.png": (Read(1, 229, 320, 0, (200, 231, 175)), ""),
  "interlaced_mpeg2.ts": (Read(50, 576, 1024, 25, (191, 180, 162)), ""),
  "jpeg_named.mp4": (Read(1, 512, 768, 0, (112, 110, 82)), ""),
  "matroska_named.mp4": (Read(51, 480, 640, 30, (124, 139, 138)), ""),
  "mjpeg.avi": (Read(60, 180, 320, 29.97, (124, 128, 125)), ""),
  "odd_353x287_yuv444.mp4": (Read(40, 287, 353, 20, (110, 108, 105)), ""),
  "one_frame.mp4": (Read(1, 512, 512, 0, (135, 131, 118)), ""),
  "pillarboxed_bw.mp4": (Read(75, 270, 480, 25, (82, 82, 82)), ""),
  "prores.mov": (Read(30, 180, 320, 29.97, (124, 127, 124)), ""),
  "rotated180_real_phone.mp4": (Read(11, 720, 1280, 10.733, (106, 104, 115)), ""),
  "rotated90.mp4": (Read(50, 480, 270, 25, (76, 72, 73)), ""),
  "rotated90_real_3frames.mov": (Read(3, 568, 320, 30, (104, 94, 85)), "too_short"),
  "single_keyframe_bframes.mp4": (Read(287, 270, 480, 29.97, (190, 178, 159)), ""),
  "soft_transition.mp4": (Read(291, 360, 640, 29.97, (106, 89, 79)), ""),
  "start_time_5s.mp4": (Read(90, 270, 480, 29.97, (174, 142, 126)), ""),
  "static_no_motion.mp4": (Read(72, 256, 384, 24, (110, 117, 113)), "static"),
  "tiny_16x16.mp4": (Read(25, 16, 28, 25, (156, 147, 151)), "too_small"),
  "truncated_faststart.mp4": (Read(73, 270, 480, 29.97, (173, 140, 123), "truncated: 73"), ""),
  "truncated_no_moov.mp4": ("unreadable", "unreadable"),
  "very_long_6min.mp4": (Read(3600, 108, 192, 10, (125, 120, 122)), ""),
  "vfr.mp4": (Read(98, 270, 480, 19.712, (147, 147, 128)), ""),
  "wide_1280x80.mp4": (Read(48, 80, 1280, 24, (84, 87, 79)), "aspect"),
  "zero_byte.mp4": ("empty", "empty"),
  "видео файл é 🎬.mp4": (Read(60, 240, 320, 30, (120, 137, 138)), ""),
}


def test_the_table_names_every_file():
  names = {p.name for p in media.real_data("awkward").iterdir()} - {"README.md"}
  assert names == set(TABLE)


@pytest.mark.timeout(60)
@pytest.mark.parametrize("name", TABLE)
def test_read_right_or_refused_for_the_right_reason(name):
  path, (expected, _) = media.real_data("awkward") / name, TABLE[name]
  if isinstance(expected, str):
    with pytest.raises(UnreadableError) as e:
      video_io.probe(path)
    assert e.value.reason == expected
    return
  info = video_io.probe(path)
  assert (info.num_frames, info.height, info.width) == (expected.frames, expected.height, expected.width)
  assert info.fps == pytest.approx(expected.fps, abs=1e-3) and info.note.startswith(expected.note)
  assert bool(info.note) == bool(expected.note)
  size = {"height": 32, "width": max(1, round(32 * info.width / info.height))}
  step = 1 / (info.fps or 1)
  middle = video_io.read_clip(path, num_frames=1, fps=info.fps, start_s=(info.num_frames // 2) * step, **size)
  assert np.abs(middle[0].mean((0, 1)) - expected.color).max() <= 4
  if (
    info.num_frames > 1
  ):  # every frame that it is said to have is there, and none is there twice to fill it up
    rate = info.fps * (1 - 1e-6)
    clip = video_io.read_clip(path, num_frames=min(info.num_frames, 400), fps=rate, **size)
    assert clip.shape[0] == min(info.num_frames, 400)
  with pytest.raises(UnreadableError):
    video_io.read_clip(path, num_frames=30, fps=info.fps or 30, start_s=info.num_frames * step + 5, **size)


def frame_of(name: str, share: float = 0.5, height: int = 96, width: int = 128) -> np.ndarray:
  path = media.real_data("awkward") / name
  info = video_io.probe(path)
  start = share * (info.num_frames - 1) / info.fps if info.fps else 0.0
  clip = video_io.read_clip(path, num_frames=1, height=height, width=width, fps=info.fps, start_s=start)
  return clip[0].astype(int)


def test_upright():
  """The same picture stored upright and lying, beside one without a mark of rotation."""
  upright = frame_of("image_cmyk.jpg", height=96, width=64)
  turned = frame_of("image_exif_rotate6.jpg", height=96, width=64)
  assert np.abs(upright - turned).mean() < 12 < np.abs(upright - turned[::-1, ::-1]).mean()
  phone = frame_of("rotated180_real_phone.mp4")  # the carpet is below, the bright screen not
  assert phone[:48].mean() > phone[48:].mean()


def test_right_colours():
  alpha = frame_of("alpha_vp9.webm")
  assert (alpha[:8, :8] >= 250).all() and alpha[40:70, 60:80].mean() < 150  # a man before white
  bars = frame_of("full_range_bt709.mp4", height=180, width=320)[80, 10::46][:6].tolist()
  assert all(np.ptp(c) > 150 for c in bars), bars  # red, green, yellow, blue, magenta, cyan: not washed out
  deep = frame_of("image_gray16.png")
  assert deep[0].mean() < 8 and deep[-1].mean() > 247 and np.ptp(deep, axis=-1).max() == 0
  gecko = frame_of("image_rgba.png")
  assert (gecko[0, 0] == 255).all()


def test_fields_are_made_one_picture():
  """Rows of the two fields show different moments: lines that comb where something moves, unless woven."""
  path = media.real_data("awkward") / "interlaced_mpeg2.ts"
  frames = video_io.read_clip(path, num_frames=20, height=576, width=1024, fps=25.0).astype(int)
  with video_io._open_video(path) as (container, stream):
    raw = next(f for k, f in enumerate(container.decode(stream)) if k == 19).to_ndarray(format="rgb24")

  def comb(image):
    return np.abs(2 * image[1:-1] - image[:-2] - image[2:]).mean()

  assert comb(frames[19]) < 0.8 * comb(raw.astype(int))


def test_prepared_each_is_kept_or_dropped_by_the_right_rule(tmp_path):
  outcome = run_inline(
    media.real_data("awkward"),
    tmp_path / "out",
    {"captions_optional": True, "min_size": 32},
    stages=STAGES,
    resolutions=(64,),
    durations=(1, 9),
  )
  kept = {s.item.name for s, _ in outcome.kept}
  assert kept == {name for name, (_, rule) in TABLE.items() if not rule}
  dropped = {d["name"]: d["rule"] for d in outcome.dropped if d["name"] not in kept}
  assert dropped == {name: rule for name, (_, rule) in TABLE.items() if rule} | {"README.md": "not_media"}
  film = next(s for s, _ in outcome.kept if s.item.name == "pillarboxed_bw.mp4")
  assert film.crop[0] > 20 and film.crop[1] < 460  # the bars at its sides are cut off
  assert all(s.height % 16 == s.width % 16 == 0 for s, _ in outcome.kept)
