import colorsys
import pickle
from fractions import Fraction

import av
import numpy as np
import pytest
from PIL import Image

from data_pipelines import color, video_io
from data_pipelines.video_io import UnreadableError, probe, read_clip
from tests import media


def read(path, num_frames, fps=12.0, start_s=0.0, height=48, width=64):
  return read_clip(path, num_frames=num_frames, height=height, width=width, fps=fps, start_s=start_s)


def reason(path) -> str:
  with pytest.raises(UnreadableError) as e:
    probe(path)
  return e.value.reason


@pytest.mark.parametrize("limit", [120.0, 0.0])
@pytest.mark.parametrize("container", ["mp4", "matroska", "mpegts", "avi"])
def test_probe_counts_frames_and_rate(tmp_path, container, limit):
  path = media.make_clip(
    tmp_path / "a.bin", 24, container=container, codec="mpeg4" if container == "avi" else "libx264"
  )
  info = probe(path, decode_limit_s=limit)
  assert (info.num_frames, info.height, info.width, info.note) == (24, 48, 64, "")
  assert info.fps == pytest.approx(12, rel=0.01)


def test_frames_are_taken_by_time(tmp_path):
  path = media.make_clip(tmp_path / "a.mp4", 12)
  assert media.grey(read(path, 12)) == list(range(12))
  assert media.grey(read(path, 6, fps=6.0)) == [0, 2, 4, 6, 8, 10]
  assert media.grey(read(path, 4, fps=4.0)) == [0, 3, 6, 9]
  assert media.grey(read(path, 3, start_s=0.5)) == [6, 7, 8]


def test_variable_frame_rate(tmp_path):
  times = [0, 0.1, 0.2, 0.6, 0.7, 1.1]
  path = media.make_clip(tmp_path / "a.mp4", 6, times=times)
  assert media.grey(read(path, 11, fps=10.0)) == [0, 1, 2, 2, 2, 2, 3, 4, 4, 4, 4]
  info = probe(path)
  assert info.num_frames == 6 and info.num_frames / info.fps == pytest.approx(1.2, rel=0.02)


@pytest.mark.parametrize("gop", [5, 12, 1000])
@pytest.mark.parametrize("container", ["mp4", "mpegts", "matroska"])
def test_a_seek_is_exact(tmp_path, gop, container):
  path = media.make_clip(tmp_path / "a", 26, fps=4, gop=gop, container=container)  # 6.5 s, B-frames
  for start in range(0, 22, 3):
    assert media.grey(read(path, 4, fps=4.0, start_s=start / 4)) == list(range(start, start + 4))


def test_start_time_counts_from_the_first_frame(tmp_path):
  path = media.make_clip(tmp_path / "a.mp4", 6, times=[5 + i / 12 for i in range(6)])
  assert media.grey(read(path, 6)) == list(range(6))
  assert probe(path).num_frames == 6


def set_rotation(path, matrix: list[int]) -> None:
  """Patches the display matrix of the track header of an MP4."""
  data = bytearray(path.read_bytes())
  at = data.find(b"tkhd") + 4 + 40
  for k, value in zip((0, 1, 3, 4), matrix):
    data[at + 4 * k : at + 4 * k + 4] = (value * 65536).to_bytes(4, "big", signed=True)
  path.write_bytes(data)


@pytest.mark.parametrize(
  "matrix,size,bright",
  [
    ([1, 0, 0, 1], (48, 64), "top left"),
    ([0, 1, -1, 0], (64, 48), "top right"),  # a quarter turn clockwise
    ([-1, 0, 0, -1], (48, 64), "bottom right"),
    ([0, -1, 1, 0], (64, 48), "bottom left"),
    ([-1, 0, 0, 1], (48, 64), "top right"),  # mirrored
  ],
)
def test_rotation_and_mirroring_are_applied(tmp_path, matrix, size, bright):
  path = media.make_clip(tmp_path / "a.mp4", 3, corner=True)
  set_rotation(path, matrix)
  info = probe(path)
  assert (info.height, info.width) == size
  clip = read(path, 1, height=size[0], width=size[1])[0].mean(-1)
  h, w = size[0] // 2, size[1] // 2
  corners = {
    "top left": clip[:h, :w],
    "top right": clip[:h, w:],
    "bottom left": clip[h:, :w],
    "bottom right": clip[h:, w:],
  }
  assert max(corners, key=lambda k: corners[k].mean()) == bright


def test_sample_aspect_ratio_widens(tmp_path):
  info = probe(media.make_clip(tmp_path / "a.mp4", 2, sar=Fraction(3, 2)))
  assert (info.height, info.width) == (48, 96)


def test_damaged_files_give_their_sound_frames_only(tmp_path):
  whole = media.make_clip(tmp_path / "a.mkv", 120, gop=10, size=(128, 128), corner=True)
  data = whole.read_bytes()
  cut = tmp_path / "cut.mkv"
  cut.write_bytes(data[: len(data) // 2])
  info = probe(cut)
  assert 10 < info.num_frames < 110
  assert read(cut, info.num_frames, height=32, width=32).shape == (info.num_frames, 32, 32, 3)
  with pytest.raises(UnreadableError, match="truncated: .* of 120 frames"):
    read(cut, 120)


def test_an_mp4_that_ends_early_says_so(tmp_path):
  path = tmp_path / "a.mp4"
  video = np.random.default_rng(0).integers(0, 255, (30, 64, 64, 3), np.uint8)
  video_io.write_mp4(path, video, 10)  # its header comes first
  path.write_bytes(path.read_bytes()[: path.stat().st_size // 2])
  info = probe(path)
  assert 0 < info.num_frames < 30 and "truncated" in info.note


def test_what_is_no_media_is_named(tmp_path):
  empty, html, audio, gone = (tmp_path / n for n in ("empty.mp4", "html.mp4", "audio.mp4", "gone.mp4"))
  empty.write_bytes(b"")
  html.write_text("<html>404</html>")
  with av.open(str(audio), "w") as out:
    stream = out.add_stream("aac", rate=44100)
    frame = av.AudioFrame.from_ndarray(np.zeros((1, 1024), np.float32), "fltp", "mono")
    frame.sample_rate = 44100
    out.mux(stream.encode(frame))
    out.mux(stream.encode())
  assert [reason(p) for p in (empty, html, audio, gone)] == ["empty", "unreadable", "no_video", "missing"]


def test_playlists_may_not_name_other_files(tmp_path):
  media.make_clip(tmp_path / "secret.mp4", 3)
  sly = tmp_path / "a.mp4"
  sly.write_text("ffconcat version 1.0\nfile secret.mp4\n")
  assert reason(sly) == "unreadable"
  sly.write_text("#EXTM3U\n#EXT-X-TARGETDURATION:1\n#EXTINF:1,\nsecret.mp4\n#EXT-X-ENDLIST\n")
  assert reason(sly) == "unreadable"


def test_one_frame_is_an_image(tmp_path):
  info = probe(media.make_clip(tmp_path / "a.mp4", 1))
  assert (info.num_frames, info.fps) == (1, 0.0)
  assert media.grey(read(tmp_path / "a.mp4", 1, fps=0.0)) == [0]


def test_content_decides_not_the_name(tmp_path):
  media.make_image(tmp_path / "a.png")
  (tmp_path / "a.png").rename(tmp_path / "a.mp4")
  assert probe(tmp_path / "a.mp4").num_frames == 1
  media.make_clip(tmp_path / "b.mkv", 3).rename(tmp_path / "b.png")
  assert probe(tmp_path / "b.png").num_frames == 3


def test_images_of_any_mode(tmp_path):
  def pixel(name):
    return read_clip(tmp_path / name, num_frames=1, height=8, width=8)[0, 4, 4].tolist()

  Image.new("RGBA", (16, 16), (255, 0, 0, 0)).save(tmp_path / "clear.png")
  assert pixel("clear.png") == [255, 255, 255]
  Image.new("CMYK", (16, 16), (0, 255, 255, 0)).save(tmp_path / "cmyk.jpg")
  assert pixel("cmyk.jpg")[0] > 200 and max(pixel("cmyk.jpg")[1:]) < 60
  Image.fromarray(np.full((16, 16), 32768, np.uint16)).save(tmp_path / "deep.png")
  assert pixel("deep.png") == [127, 127, 127]
  Image.new("P", (16, 16), 3).save(tmp_path / "palette.gif")
  assert probe(tmp_path / "palette.gif").num_frames == 1
  exif = Image.Exif()
  exif[0x0112] = 6
  Image.new("RGB", (16, 8)).save(tmp_path / "turned.jpg", exif=exif)
  info = probe(tmp_path / "turned.jpg")
  assert (info.height, info.width) == (16, 8)
  (tmp_path / "cut.png").write_bytes((tmp_path / "deep.png").read_bytes()[:50])
  assert reason(tmp_path / "cut.png") in ("truncated", "unreadable")


def test_an_animation_is_a_video(tmp_path):
  frames = [Image.new("RGB", (32, 32), (c, c, c)) for c in (0, 80, 160)]
  frames[0].save(tmp_path / "a.gif", save_all=True, append_images=frames[1:], duration=100)
  info = probe(tmp_path / "a.gif")
  assert info.num_frames == 3 and info.fps == pytest.approx(10, rel=0.05)


@pytest.mark.parametrize("height,width", [(48, 64), (47, 63), (1080, 32)])
def test_written_clips_read_back(tmp_path, height, width):
  colours = np.array([[200, 30, 30], [30, 200, 30], [30, 30, 200], [128, 128, 128]], np.uint8)
  video = np.broadcast_to(colours[:, None, None], (4, height, width, 3))
  video_io.write_mp4(tmp_path / "a.mp4", video, 24000 / 1001)
  info = probe(tmp_path / "a.mp4")
  assert (info.num_frames, info.height, info.width) == (4, height, width)
  assert info.fps == pytest.approx(24000 / 1001)
  back = read_clip(tmp_path / "a.mp4", num_frames=4, height=height, width=width, fps=info.fps)
  assert np.abs(back.astype(int) - video).max() < 8
  assert sorted(p.name for p in tmp_path.iterdir()) == ["a.mp4"]


def test_hdr_white_and_black_stay_neutral():
  grey = np.full((2, 2, 3), round(0.58 * 65535), np.uint16)  # PQ code of diffuse white, 203 nits
  image = color.tone_map(grey, 16)
  assert np.ptp(image) <= 1 and 170 < image.mean() < 230
  assert color.tone_map(np.zeros((2, 2, 3), np.uint16), 18).max() == 0


def test_png_and_errors_pickle(tmp_path):
  image = np.arange(5 * 7 * 3, dtype=np.uint8).reshape(5, 7, 3)
  video_io.write_png(tmp_path / "a.png", image)
  assert np.array_equal(np.asarray(Image.open(tmp_path / "a.png")), image)
  error = pickle.loads(pickle.dumps(UnreadableError("empty", "0 bytes")))
  assert (error.reason, str(error)) == ("empty", "empty: 0 bytes")


@pytest.mark.parametrize("nits,expected", [(0, 0), (10, 60), (203, 188), (1000, 238), (4000, 255)])
def test_hdr_light_becomes_a_known_grey(nits, expected):
  """Against SMPTE ST 2084 and the roll-off as written, one value at a time."""
  y = (nits / 10000) ** (2610 / 16384)
  code = ((0.8359375 + 18.8515625 * y) / (1 + 18.6875 * y)) ** (2523 / 32) if nits else 0.0
  grey = np.full((1, 1, 3), round(code * 65535), np.uint16)
  light = nits / 203
  light = light * (1 + light / (4000 / 203) ** 2) / (1 + light)
  srgb = 12.92 * light if light <= 0.0031308 else 1.055 * light ** (1 / 2.4) - 0.055
  assert abs(round(255 * srgb) - expected) <= 2
  assert np.abs(color.tone_map(grey, 16).astype(int) - round(255 * srgb)).max() <= 2


def test_hdr_colours_keep_their_hue():
  """sRGB colours taken to BT.2020 and PQ at 100 nits for white come back darker, of the same hue."""
  to_2020 = np.array([[0.6274, 0.3293, 0.0433], [0.0691, 0.9195, 0.0114], [0.0164, 0.0880, 0.8956]])
  colours = np.array([[200, 40, 40], [40, 180, 60], [50, 70, 210], [220, 200, 60], [128, 128, 128]]) / 255
  linear = np.where(colours <= 0.04045, colours / 12.92, ((colours + 0.055) / 1.055) ** 2.4)
  y = (linear @ to_2020.T * 100 / 10000) ** (2610 / 16384)
  code = ((0.8359375 + 18.8515625 * y) / (1 + 18.6875 * y)) ** (2523 / 32)
  back = color.tone_map(np.round(code * 65535).astype(np.uint16)[None], 16)[0] / 255
  hue = [colorsys.rgb_to_hsv(*c)[0] for c in back[:4]]
  assert np.abs(np.array(hue) - [colorsys.rgb_to_hsv(*c)[0] for c in colours[:4]]).max() < 0.03
  assert np.ptp(back[4]) < 0.01 and (back <= colours + 0.02).all()


def test_hdr_colours_beyond_the_screen_keep_their_light():
  """Pure primaries of BT.2020 have no place in BT.709: they become paler, not brighter or darker."""
  for nits, primary in ((60, 0), (60, 1), (120, 1), (60, 2)):
    linear = np.eye(3)[primary] * nits
    y = (linear / 10000) ** (2610 / 16384)
    code = ((0.8359375 + 18.8515625 * y) / (1 + 18.6875 * y)) ** (2523 / 32)
    back = color.tone_map(np.round(code * 65535).astype(np.uint16)[None, None], 16)[0, 0] / 255
    shown = np.where(back <= 0.04045, back / 12.92, ((back + 0.055) / 1.055) ** 2.4) @ [
      0.2126,
      0.7152,
      0.0722,
    ]
    light = nits / 203
    light *= (1 + light / (4000 / 203) ** 2) / (1 + light)
    assert shown == pytest.approx(light * [0.2627, 0.678, 0.0593][primary], rel=0.05)
    assert back.argmax() == primary


def woven(path, num_frames=12):
  """Interlaced H.264: a bar that moves between the two fields of a frame."""
  with av.open(str(path), "w") as out:
    stream = out.add_stream("libx264", rate=25, options={"x264-params": "tff=1", "crf": "10"})
    stream.width, stream.height, stream.pix_fmt = 64, 64, "yuv420p"
    stream.codec_context.flags |= av.codec.context.Flags.interlaced_dct | av.codec.context.Flags.interlaced_me
    for t in range(num_frames):
      image = np.full((64, 64, 3), 30, np.uint8)
      for field in (0, 1):
        x = 4 * t + 2 * field
        image[field::2, x : x + 8] = 220
      out.mux(stream.encode(av.VideoFrame.from_ndarray(image, format="rgb24")))
    out.mux(stream.encode())
  return path


def test_interlaced_frames_are_made_whole(tmp_path):
  path = woven(tmp_path / "a.mp4")
  with av.open(str(path)) as container:
    frames = list(container.decode(video=0))
  assert all(f.interlaced_frame for f in frames)
  clip = read(path, 12, fps=25.0, height=64, width=64).astype(int)
  raw = np.stack([f.to_ndarray(format="rgb24") for f in frames]).astype(int)
  comb = [np.abs(2 * v[1:-1, 1:-1] - v[1:-1, :-2] - v[1:-1, 2:]).mean() for v in (clip, raw)]
  assert comb[0] < 0.4 * comb[1]
  centre = [float((f[..., 0].sum(0) * np.arange(64)).sum() / f[..., 0].sum()) for f in clip - 30]
  assert np.abs(np.diff(centre[1:-1]) - 4).max() < 1  # in order, none lost, none twice
  again = read(path, 4, fps=25.0, start_s=0.2, height=64, width=64)
  assert np.array_equal(again, clip[5:9])
  assert probe(path).num_frames == 12


@pytest.mark.parametrize("codec", ["libvpx-vp9", "libvpx"])
def test_alpha_of_webm_goes_on_white(tmp_path, codec):
  with av.open(str(tmp_path / "a.webm"), "w") as out:
    stream = out.add_stream(codec, rate=10)
    stream.width, stream.height, stream.pix_fmt = 64, 64, "yuva420p"
    stream.options = {"auto-alt-ref": "0"}
    stream.metadata["alpha_mode"] = "1"
    for _ in range(15):
      image = np.zeros((64, 64, 4), np.uint8)
      image[:, 32:] = (200, 30, 30, 255)
      out.mux(stream.encode(av.VideoFrame.from_ndarray(image, format="rgba").reformat(format="yuva420p")))
    out.mux(stream.encode())
  for start in (0.0, 1.2):
    clip = read(tmp_path / "a.webm", 2, fps=10.0, start_s=start, height=64, width=64).astype(int)
    assert clip[:, :, :28].min() > 245 and np.abs(clip[:, :, 36:] - [200, 30, 30]).max() < 25
  assert probe(tmp_path / "a.webm").num_frames == 15
