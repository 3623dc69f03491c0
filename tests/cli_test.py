"""The mains as a user runs them: bad input is one clear line and exit code 2; a run from start to samples."""

import json
import os
import subprocess
import sys
from pathlib import Path

import av
import numpy as np
import pytest
from PIL import Image

from tests import forked

ROOT = Path(__file__).resolve().parent.parent
DEBUG = "--config=configs/quickstart.py:debug"
SMALL = (
  "--config.model.width=16",
  "--config.model.depth=1",
  "--config.train.num_steps=2",
  "--config.optimizer.name=adamw",
)
TRAIN, SAMPLE, EVALUATE, PLOTS = (f"sora_jax.{name}" for name in ("train", "sample", "evaluate", "plots"))


def environment() -> dict[str, str]:
  """One device."""
  kept = [f for f in os.environ.get("XLA_FLAGS", "").split() if "device_count" not in f]
  return os.environ | {"JAX_PLATFORMS": "cpu", "XLA_FLAGS": " ".join(kept), "PYTHONPATH": str(ROOT)}


def start(*args) -> subprocess.CompletedProcess:
  """A main as a user starts it: once each, the rest is forked."""
  command = [sys.executable, "-m", *map(str, args)]
  return subprocess.run(command, capture_output=True, text=True, cwd=ROOT, env=environment(), timeout=300)


def fork(*args) -> subprocess.CompletedProcess:
  return forked.run([args], environment())[0]


def run(how, *args) -> str:
  done = how(*args)
  assert done.returncode == 0, done.stderr[-3000:]
  return done.stdout


@pytest.fixture(scope="module")
def workdir(tmp_path_factory):
  """A run of two steps."""
  workdir = tmp_path_factory.mktemp("run")
  run(start, TRAIN, DEBUG, f"--workdir={workdir}", *SMALL)
  return workdir


def bad_inputs(folder: Path) -> dict:
  """name -> (arguments, what the line says)."""
  empty, mute, other = (folder / name for name in ("empty", "mute", "other"))
  for path in (empty, mute, other):
    path.mkdir()
  Image.fromarray(np.zeros((64, 64, 3), np.uint8)).save(mute / "a.png")
  (folder / "file").write_text("not a folder")
  (folder / "broken.py").write_text("def get_config(preset=''):\n  return undefined_name\n")
  (other / "config.json").write_text(json.dumps({"task": "text_to_video", "model": {"width": 99}}))
  new = f"--workdir={folder / 'new'}"
  train = (TRAIN, DEBUG, new)
  return {
    "unknown key": ((*train, "--config.model.colour=3"), "colour"),
    "mistyped key": ((*train, "--config.train.num_step=3"), "config.train.num_step; did you mean num_steps"),
    "accumulate": ((*train, "--config.train.accumulate=3"), "data.rows = 2 does not split"),
    "unknown flag": ((*train, "--colour=3"), "colour"),
    "wrong type": ((*train, "--config.model.width=wide"), "wide"),
    "wrong value": ((*train, "--config.diffusion.path=linear"), "diffusion.path='linear' is not one of"),
    "no config": ((TRAIN, new), "--config=FILE.py and --workdir=DIR"),
    "config not there": ((TRAIN, "--config=configs/none.py", new), "configs/none.py"),
    "config broken": ((TRAIN, f"--config={folder / 'broken.py'}", new), "undefined_name"),
    "unknown preset": ((TRAIN, "--config=configs/quickstart.py:huge", new), "no preset 'huge'"),
    "no folder": ((*train, f"--config.data.source={folder / 'none'}"), "none"),
    "empty folder": ((*train, f"--config.data.source={empty}"), "empty"),
    "no captions": ((*train, f"--config.data.source={mute}"), "caption"),
    "unwritable": ((TRAIN, DEBUG, f"--workdir={folder / 'file' / 'run'}"), "Not a directory"),
    "other model": ((TRAIN, DEBUG, f"--workdir={other}"), "model.width was 99, now 32"),
    "mesh": ((*train, "--config.mesh.fsdp=3"), "fsdp=3"),
    "no run": ((SAMPLE, f"--workdir={folder / 'none'}", "--prompt=a"), "not the workdir of a training run"),
    "no prompt": ((SAMPLE, f"--workdir={other}"), 'give --prompt="..."'),
    "evaluate no run": ((EVALUATE, f"--workdir={empty}"), "not the workdir of a training run"),
    "plot nothing": ((PLOTS, f"--workdir={empty}"), "no losses"),
  }


def test_bad_input_is_one_clear_line(tmp_path):
  cases, wrong = bad_inputs(tmp_path), []
  ended = forked.run([args for args, _ in cases.values()], environment())
  for (name, (_, says)), done in zip(cases.items(), ended):
    err = done.stderr.splitlines()
    lines = [line for line in err if line.startswith("error: ")]
    ok = done.returncode == 2 and len(lines) == 1 and says in lines[0]
    if not ok or err[-1] != lines[0] or "Traceback" in done.stderr:
      wrong.append(f"{name}: code {done.returncode}, {done.stdout}{done.stderr[-2000:]}")
  assert not wrong, "\n".join(wrong)
  real = start(*cases["unknown key"][0])
  shown = lambda done: (done.returncode, done.stdout, done.stderr)  # noqa: E731
  assert shown(real) == shown(ended[list(cases).index("unknown key")])
  assert not (tmp_path / "new").exists() or not (tmp_path / "new" / "checkpoints").exists()


def test_debug_shows_the_traceback(tmp_path):
  for how in (start, fork):
    done = how(SAMPLE, f"--workdir={tmp_path}", "--prompt=a", "--debug")
    assert done.returncode not in (0, 2) and "Traceback" in done.stderr
    assert "FileNotFoundError" in done.stderr


def test_a_run_from_start_to_samples(workdir, tmp_path):
  for name in (
    "config.json",
    "tokenizer.json",
    "metrics.jsonl",
    "prompts.txt",
    "samples/step_000002.png",
  ):
    assert (workdir / name).is_file(), name
  assert list((workdir / "checkpoints").iterdir()) and list((workdir / "tensorboard").iterdir())
  image = tmp_path / "first.png"
  Image.fromarray(np.full((32, 64, 3), (200, 30, 60), np.uint8)).save(image)
  prompts = tmp_path / "prompts.txt"
  prompts.write_text("# two\na photo --w 24 --h 32 --f 1\na clip --w 32 --h 16 --f 4 --fps 5 --d 3 --s 1\n")
  out = tmp_path / "out"
  common = (SAMPLE, f"--workdir={workdir}", f"--output_dir={out}", "--num_inference_steps=2")
  asked = ("--prompt=a dog", f"--prompts_file={prompts}", "--num_videos_per_prompt=2")
  lines = run(fork, *common, *asked).split()
  assert lines[-1].endswith("sheet_0000.png") and len(lines) == 7
  kinds = [Path(line).suffix for line in lines[:-1]]
  assert kinds == [".mp4", ".mp4", ".png", ".png", ".mp4", ".mp4"]
  assert Image.open(out / "sample_0002.png").size == (24, 32)
  with av.open(str(out / "sample_0004.mp4")) as clip:
    stream = clip.streams.video[0]
    frames = [f.to_ndarray(format="rgb24") for f in clip.decode(stream)]
    assert (stream.codec_context.name, stream.average_rate, np.shape(frames)) == ("h264", 5, (4, 16, 32, 3))
  said = json.loads((out / "sample_0005.json").read_text())
  assert said["prompt"] == "a clip" and (said["seed"], said["index"], said["num_inference_steps"]) == (
    3,
    1,
    1,
  )
  assert said["checkpoint_step"] == 2 and said["versions"]["jax"] and said["config_digest"]
  # What the file says makes the sample again; an image prompt keeps its aspect ratio; numbers go on.
  again = [
    f"--{k}={said[k]}" for k in ("prompt", "width", "height", "num_frames", "fps", "seed", "sampler", "index")
  ]
  run(fork, *common[:3], *again, "--num_inference_steps=1", "--num_videos_per_prompt=2", f"--image={image}")
  first = json.loads((out / "sample_0006.json").read_text())
  assert (first["image"], first["index"]) == (str(image), 1) and first["prompt_frames"] == 1
  with av.open(str(out / "sample_0006.mp4")) as clip:
    frame = next(clip.decode(video=0)).to_ndarray(format="rgb24").astype(int)
  assert np.abs(frame - (200, 30, 60)).mean() < 8  # H.264 loses a little


def test_wrong_sizes_name_the_nearest(workdir):
  common = (SAMPLE, f"--workdir={workdir}", "--prompt=a dog")
  cases = [
    (("--width=50",), "width = 50 is no multiple of 8; nearest: 48 and 56"),
    (("--num_frames=3",), "num_frames = 3 is neither 1 nor a multiple of 2; nearest: 2 and 4"),
    (("--sampler=magic",), "sampler 'magic' is not one of euler, heun, ddim"),
    (("--step=7",), "no checkpoint of step 7"),
    (("--image=no.png",), "the prompt no.png cannot be read: missing"),
  ]
  ended = forked.run([(*common, *args) for args, _ in cases], environment())
  for done, (_, says) in zip(ended, cases):
    err = done.stderr
    assert done.returncode == 2 and says in err and "Traceback" not in err, err[-2000:]


def test_evaluation_and_plot(workdir):
  out = run(start, EVALUATE, f"--workdir={workdir}", "--num_samples=6")
  result = json.loads((workdir / "evaluation.json").read_text())
  assert result["rendered_truth"] == {"colour": 1.0, "direction": 1.0}
  assert set(result["samples"]) == {"colour", "direction"} and "rendered truth" in out
  assert run(start, PLOTS, f"--workdir={workdir}").strip() == str(workdir / "loss.png")
  assert Image.open(workdir / "loss.png").size[0] > 400
