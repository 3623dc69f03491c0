"""Prompt files: one prompt a line, options behind it, `#` before a comment.

`a red circle moving left --w 32 --h 24 --f 8 --fps 8 --d 7 --s 50 --l 4.0 --n blurry --i first.png`: width,
height, frames, frames per second, seed, steps, guidance scale, negative prompt, image prompt (`--v`: video
prompt, `--k`: index, which video of the prompt and the seed). All options are optional; the flags of the
command line stand in for them.
"""

import re
from collections.abc import Iterable
from pathlib import Path

from sora_jax.generate import Request

# option -> (name, type)
OPTIONS = {
  "w": ("width", int),
  "h": ("height", int),
  "f": ("num_frames", int),
  "fps": ("fps", float),
  "d": ("seed", int),
  "k": ("index", int),
  "s": ("num_inference_steps", int),
  "l": ("guidance_scale", float),
  "n": ("negative_prompt", str),
  "i": ("image", str),
  "v": ("video", str),
}
_OPTION = re.compile(r"(?:^|\s)--(\w+)(?:\s+|=|$)")
GRID = "prompts.txt"  # in a workdir: what its sample grids were made from


def parse_line(line: str, where: str = "prompt") -> dict:
  """{"prompt": ..., option names: values} of one line."""
  prompt, *rest = _OPTION.split(line.strip())
  values = {"prompt": prompt.strip()}
  for key, text in zip(rest[::2], rest[1::2]):
    if key not in OPTIONS:
      raise ValueError(f"{where}: unknown option --{key}; options: {', '.join('--' + k for k in OPTIONS)}")
    name, kind = OPTIONS[key]
    try:
      values[name] = kind(text.strip())
    except ValueError:
      raise ValueError(f"{where}: --{key} {text.strip()!r} is not a number") from None
  return values


def read(path: str | Path) -> list[dict]:
  try:
    lines = Path(path).read_text(encoding="utf-8").splitlines()
  except UnicodeDecodeError:
    raise ValueError(f"{path} is not UTF-8 text; one prompt a line is expected") from None
  found = [
    parse_line(line, f"{path}:{number}")
    for number, line in enumerate(lines, 1)
    if line.strip() and not line.lstrip().startswith("#")
  ]
  if not found:
    raise ValueError(f"{path} holds no prompt")
  return found


def write(path: str | Path, requests: Iterable[Request]) -> None:
  lines = []
  for r in requests:
    prompt = re.sub(r"\s--", " -", " ".join(r.prompt.split())).lstrip("#- ")
    lines.append(f"{prompt} --w {r.width} --h {r.height} --f {r.num_frames} --fps {r.fps:g} --d {r.seed}\n")
  Path(path).write_text("".join(lines), encoding="utf-8")
