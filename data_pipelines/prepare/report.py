"""One HTML file, pictures inline, that tells what came in, what went out and why."""

import collections
import html
import os
from collections.abc import Iterable, Sequence
from pathlib import Path
from typing import Any

from data_pipelines.prepare import svg
from data_pipelines.prepare.config import PrepareConfig
from data_pipelines.prepare.plan import Sample

_EXAMPLES, _LISTED, _SHOWN = 6, 200, 36
_STYLE = """
body { font: 14px/1.45 system-ui, sans-serif; max-width: 1100px; margin: 2em auto; padding: 0 1em }
h1 { font-size: 1.5em } h2 { font-size: 1.15em; margin-top: 2em; border-bottom: 1px solid #ddd }
table { border-collapse: collapse } th, td { text-align: left; padding: .2em .8em .2em 0 }
tr + tr td { border-top: 1px solid #eee } td.n, th.n { text-align: right }
.grid { display: flex; flex-wrap: wrap; gap: 8px } figure { margin: 0; width: 150px; font-size: 11px }
figure img { max-width: 150px; max-height: 112px; display: block } figcaption { overflow-wrap: anywhere }
.bar { background: #4878a8; height: .8em; display: inline-block } """


def write(path: Path, outcome: Any, config: PrepareConfig) -> None:
  """`outcome` is run.Outcome."""
  parts = [
    "<h1>Preparation</h1>",
    _summary(outcome, config),
    _rules(outcome),
    _plots(outcome),
    _buckets(outcome),
    _samples(outcome),
    _shards(outcome),
    _settings(config),
  ]
  page = (
    f'<!doctype html>\n<html lang="en"><meta charset="utf-8"><title>Preparation: {len(outcome.kept)} clips'
    f"</title>\n<style>{_STYLE}</style>\n" + "\n".join(parts) + "\n</html>\n"
  )
  part = path.with_name(f".{path.name}.part")
  part.write_text(page, encoding="utf-8")
  os.replace(part, path)


def _summary(outcome: Any, config: PrepareConfig) -> str:
  looks = outcome.looks
  infos = [look["info"] for look in looks if look["info"]]
  videos = [i for i in infos if i["num_frames"] > 1]
  clips = [sample for sample, _ in outcome.kept]
  partly = [look for look in looks if look["note"]]
  rows = [
    ("files named", len(looks) + len(outcome.rejects)),
    ("readable", f"{len(infos)}: {len(videos)} videos, {len(infos) - len(videos)} images"),
    ("video that came in", _time(sum(i["num_frames"] / i["fps"] for i in videos))),
    ("shots", sum(look["shots"] for look in looks)),
    ("used in part", len(partly)),
    ("dropped", len(outcome.dropped)),
    ("kept", f"{len(clips)}: {sum(s.num_frames > 1 for s in clips)} clips of video, "
             f"{sum(s.num_frames == 1 for s in clips)} images"),
    ("video that was kept", _time(sum(s.num_frames / s.fps for s in clips if s.fps))),
    ("without a caption", sum(not s.item.captions for s in clips)),
    ("black bars cut off", sum("borders" in s.scores for s in clips) if config.borders == "crop" else "no"),
  ]  # fmt: skip
  text = _table((), rows)
  if partly:
    notes = [(look["name"], look["note"]) for look in partly[:_LISTED]]
    text += "<h2>Used in part</h2>" + _table(("file", "why"), notes)
  return text


def _rules(outcome: Any) -> str:
  if not outcome.dropped:
    return "<h2>Dropped</h2><p>Nothing.</p>"
  most = max(outcome.rules.values())
  parts = ["<h2>Dropped, by rule</h2><table>"]
  for rule, count in outcome.rules.items():
    width = 1 + round(240 * count / most)
    parts.append(
      f"<tr><td>{html.escape(rule)}<td class=n>{count}<td><span class=bar style='width:{width}px'></span>"
    )
  parts.append("</table>")
  for rule in outcome.rules:
    group = [d for d in outcome.dropped if d["rule"] == rule]
    seen = [d for d in group if d["thumb"]]
    examples = seen[:: max(1, len(seen) // _EXAMPLES)][:_EXAMPLES]
    parts.append(f"<h3>{html.escape(rule)} ({len(group)})</h3>")
    if examples:
      parts.append(_grid((d["thumb"], f"{_place(d)}: {d['detail']}") for d in examples))
    else:
      lines = [(_place(d), d["detail"]) for d in group[:_EXAMPLES]]
      parts.append(_table((), lines))
  parts.append("<p>All of them: dropped.jsonl beside this file.</p>")
  return "\n".join(parts)


def _place(dropped: dict[str, Any]) -> str:
  return dropped["name"] + (f" at {dropped['start_s']:g} s" if dropped["start_s"] else "")


def _plots(outcome: Any) -> str:
  clips = [s for s, _ in outcome.kept]
  infos = [look["info"] for look in outcome.looks if look["info"]]
  videos = [i for i in infos if i["fps"]]
  pairs = [
    (
      "seconds",
      [i["num_frames"] / i["fps"] for i in videos],
      [s.num_frames / s.fps for s in clips if s.fps],
      True,
    ),
    (
      "side of a square of equal area, pixels",
      [(i["height"] * i["width"]) ** 0.5 for i in infos],
      [(s.height * s.width) ** 0.5 for s in clips],
      False,
    ),
    (
      "width over height",
      [i["width"] / i["height"] for i in infos],
      [s.width / s.height for s in clips],
      True,
    ),
    ("frames a second", [i["fps"] for i in videos], [s.fps for s in clips if s.fps], False),
  ]
  plots = [
    svg.histogram({"in": before, "out": after}, label, logarithmic=logarithmic)
    for label, before, after, logarithmic in pairs
  ]
  motion = [s.scores["motion"] for s in clips if s.num_frames > 1]
  plots.append(svg.histogram({"out": motion}, "motion, levels of 255 a frame, of what was kept"))
  plots.append(svg.histogram({"out": [s.scores["luma"] for s in clips]}, "light, of 255, of what was kept"))
  return f"<h2>Sizes and durations</h2><div class=grid>{''.join(plots)}</div>"


def _buckets(outcome: Any) -> str:
  if not outcome.notes:
    return ""
  totals: dict[str, collections.Counter] = collections.defaultdict(collections.Counter)
  for note in outcome.notes:
    total = totals[note["bucket"]]
    total["shards"] += 1
    total["bytes"] += note["bytes"]
    for row in note["rows"]:
      total["samples"] += 1
      total["frames"] += row["pixel_frames"]
      total["tokens"] += row["tokens"]
  rows = [
    (name, t["samples"], t["frames"], t["tokens"], t["shards"], round(t["bytes"] / 1e6, 1))
    for name, t in sorted(totals.items())
  ]
  head = ("bucket (least frames, height, width)", "samples", "frames", "tokens", "shards", "MB")
  return "<h2>Buckets</h2>" + _table(head, rows)


def _samples(outcome: Any) -> str:
  seen = [(sample, clip) for sample, clip in outcome.kept if clip["thumb"]]
  shown = seen[:: max(1, len(seen) // _SHOWN)][:_SHOWN]
  if not shown:
    return ""
  return f"<h2>{len(shown)} of those kept</h2>" + _grid((c["thumb"], _about(s)) for s, c in shown)


def _about(sample: Sample) -> str:
  size = f"{sample.num_frames}x{sample.height}x{sample.width}"
  caption = sample.item.captions[0][:80] if sample.item.captions else "no caption"
  return f"{sample.item.name} at {sample.start_s:g} s, {size}: {caption}"


def _shards(outcome: Any) -> str:
  if not outcome.notes:
    return "<h2>Shards</h2><p>Not written: --stages without write.</p>"
  rows = [
    (n["path"], n["records"], round(n["bytes"] / 1e6, 1), n["checksum"]) for n in outcome.notes[:_LISTED]
  ]
  more = f"<p>and {len(outcome.notes) - _LISTED} more</p>" if len(outcome.notes) > _LISTED else ""
  return "<h2>Shards</h2>" + _table(("file", "records", "MB", "checksum"), rows) + more


def _settings(config: PrepareConfig) -> str:
  rows = [(key, value) for key, value in vars(config).items()]
  return "<h2>Settings</h2>" + _table((), rows)


def _table(head: Sequence[str], rows: Iterable[Sequence[Any]]) -> str:
  lines = ["<table>"]
  if head:
    lines.append("<tr>" + "".join(f"<th>{html.escape(h)}" for h in head))
  for row in rows:
    cells = (f"<td{' class=n' if isinstance(c, (int, float)) else ''}>{html.escape(str(c))}" for c in row)
    lines.append("<tr>" + "".join(cells))
  return "\n".join([*lines, "</table>"])


def _grid(pictures: Iterable[tuple[str, str]]) -> str:
  figures = (
    f'<figure><img src="data:image/jpeg;base64,{thumb}" alt=""><figcaption>{html.escape(text)}</figcaption>'
    "</figure>"
    for thumb, text in pictures
  )
  return f"<div class=grid>{''.join(figures)}</div>"


def _time(seconds: float) -> str:
  minutes, seconds = divmod(seconds, 60)
  return f"{int(minutes) // 60}:{int(minutes) % 60:02d}:{seconds:04.1f} (h:min:s)"
