"""The flags of python -m data_pipelines.prepare, one field each."""

import dataclasses
import hashlib
import re

from data_pipelines.clip_codec import CODECS
from sora_jax.packing.geometry import Patch

STAGES = (
  "probe", "shots", "cut", "filter", "dedup", "caption", "resize", "encode_latents", "encode_text", "write",
)  # fmt: skip
ALWAYS = ("probe",)
HOOKS = {"caption": "caption", "encode_latents": "latents", "encode_text": "text"}  # stage -> key it needs
MAX_DISTANCE = 7  # of two hashes: what four bands find for certain, see dedup.py
_HOOK = re.compile(r"[A-Za-z_][\w.]*:[A-Za-z_]\w*")


@dataclasses.dataclass(frozen=True, kw_only=True)
class PrepareConfig:
  stages: tuple[str, ...] = ()  # () = all, without the hooks that are not given

  # Shots and cutting.
  shot_detector: str = "adaptive"  # or "content"
  shot_threshold: float = 0.0  # 0 = the detector's own
  look_fps: float = 30.0  # frames a second, at most, that shots and filters see
  look_size: int = 128  # pixels of their longer side
  min_duration: float = 0.5  # seconds of a clip
  max_duration: float = 20.0  # longer shots are cut into equal parts
  trim: float = 0.0  # seconds taken off both ends of a shot that a cut made

  # Filters; a value of 0 (or "") switches one off, where not stated otherwise.
  min_fps: float = 4.0  # frames a second of a video
  min_luma: float = 8.0  # mean of 255: below is black
  min_contrast: float = 3.0  # standard deviation of 255: below is flat
  min_motion: float = 0.15  # mean change of a pixel between frames, of 255: below is static
  max_motion: float = 0.0  # above is too restless
  borders: str = "crop"  # black bars: "crop", "drop" or "keep"
  max_borders: float = 0.6  # share of the picture: above is dropped
  min_caption_words: int = 0  # of the longest caption
  max_caption_words: int = 0  # of the longest caption
  score: str = ""  # "module:function" of (frames_THWC, captions) -> float
  min_score: float = 0.0  # used where `score` is given

  # Near-duplicates.
  dedup_distance: int = 5  # bits of 64 in which the hash of a frame may differ
  dedup_cell: float = 24.0  # and levels of 255 by which the colour of any of its 144 cells may

  # Hooks, "module:function" or "module:Class" (built without arguments); see docs/prepare.md.
  caption: str = ""  # of (frames_THWC, captions) -> captions
  latents: str = ""  # an encoder of pixels
  text: str = ""  # an encoder of captions

  # Sizes.
  resolutions: tuple[int, ...] = (256,)  # sides of squares of equal area; the largest that fits is taken
  aspects: tuple[str, ...] = ("9:16", "2:3", "3:4", "1:1", "4:3", "3:2", "16:9")  # width:height
  multiple: int = 16  # of height and width
  max_enlarge: float = 1.15  # times, at most, that a clip is enlarged to its bucket
  max_crop: float = 0.25  # share cut off to reach the aspect ratio
  target_fps: float = 0.0  # at most; 0 = native
  durations: tuple[int, ...] = (1, 9, 17, 33, 65, 129, 257)  # frames from which on a clip is in a bucket
  frame_step: int = 1  # frames are 1 + a multiple of it: 4 for an autoencoder of temporal stride 4
  cut_to_bucket: bool = False  # exactly as many frames as the bucket's name says

  # Writing.
  codec: str = "jpeg"  # of pixels: jpeg, h264, raw
  latent_dtype: str = "float16"  # or bfloat16, float32
  shard_samples: int = 512  # at most
  patch: Patch = (1, 16, 16)  # by which the column `tokens` counts

  def __post_init__(self):
    stages = self.stages or tuple(s for s in STAGES if not HOOKS.get(s) or getattr(self, HOOKS[s]))
    object.__setattr__(self, "stages", stages)
    _check_stages(self)
    for key in ("score", "caption", "latents", "text"):
      if (value := getattr(self, key)) and not _HOOK.fullmatch(value):
        raise ValueError(f"--{key}={value} is no module:function")
    _among("shot_detector", self.shot_detector, ("adaptive", "content"))
    _among("borders", self.borders, ("crop", "drop", "keep"))
    _among("codec", self.codec, tuple(c for c in CODECS if c != "png"))
    _among("latent_dtype", self.latent_dtype, ("float16", "bfloat16", "float32"))
    for key in ("look_fps", "look_size", "min_duration", "multiple", "frame_step", "shard_samples"):
      if getattr(self, key) <= 0:
        raise ValueError(f"--{key}={getattr(self, key)} is not above 0")
    if self.max_duration < 2 * self.min_duration:
      raise ValueError(
        f"--max_duration={self.max_duration:g} is below twice --min_duration={self.min_duration:g}: "
        "the parts of a long shot would be too short"
      )
    if not 0 <= self.dedup_distance <= MAX_DISTANCE:
      raise ValueError(f"--dedup_distance={self.dedup_distance} is not between 0 and {MAX_DISTANCE}")
    for key in ("resolutions", "durations"):
      values = getattr(self, key)
      if not values or min(values) < 1:
        raise ValueError(f"--{key}={','.join(map(str, values))} is no list of numbers above 0")
    if 1 not in self.durations:
      raise ValueError(f"--durations={','.join(map(str, self.durations))} lacks 1, the bucket of images")
    for aspect in self.aspects:
      if not re.fullmatch(r"[1-9]\d*:[1-9]\d*", aspect):
        raise ValueError(f"--aspects: {aspect!r} is no width:height like 16:9")

  def has(self, stage: str) -> bool:
    assert stage in STAGES, stage
    return stage in self.stages

  def look_mark(self) -> str:
    """Of all that decides what is seen in a file and which clips are made of it."""
    keys = (
      "shot_detector", "shot_threshold", "look_fps", "look_size", "min_duration", "max_duration", "trim",
      "min_fps", "min_luma", "min_contrast", "min_motion", "max_motion", "borders", "max_borders",
      "min_caption_words", "max_caption_words", "score", "min_score",
    )  # fmt: skip
    stages = tuple(s for s in self.stages if s in ("shots", "cut", "filter"))
    return mark_of((stages, [(k, getattr(self, k)) for k in keys]))

  def write_mark(self) -> str:
    """Of all that decides how a chosen clip is stored."""
    keys = ("caption", "latents", "text", "codec", "latent_dtype")
    stages = tuple(s for s in self.stages if s in HOOKS)
    return mark_of((stages, [(k, getattr(self, k)) for k in keys]))


def mark_of(facts: object) -> str:
  return hashlib.blake2b(repr(facts).encode(), digest_size=8).hexdigest()


def _check_stages(config: PrepareConfig) -> None:
  unknown = [s for s in config.stages if s not in STAGES]
  if unknown:
    raise ValueError(f"--stages: no stage {', '.join(unknown)}; there are {', '.join(STAGES)}")
  for stage in ALWAYS:
    if stage not in config.stages:
      raise ValueError(f"--stages: {stage} cannot be left out")
  if config.min_score and not config.score:
    raise ValueError(f"--min_score={config.min_score:g} needs --score=module:function")
  if config.score and not config.has("filter"):
    raise ValueError("--score is given and --stages lacks filter")
  for stage, key in HOOKS.items():
    if stage in config.stages and not getattr(config, key):
      raise ValueError(f"--stages: {stage} needs --{key}=module:function")
    if getattr(config, key) and stage not in config.stages:
      raise ValueError(f"--{key} is given and --stages lacks {stage}")


def _among(key: str, value: str, known: tuple[str, ...]) -> None:
  if value not in known:
    raise ValueError(f"--{key}={value} is none of {', '.join(known)}")
