"""The table of a rehearsal, its JSON, and what of it must not change unseen."""

import json
from pathlib import Path
from typing import Any

GOLDEN_KEYS = ("params", "devices", "hbm_bytes", "collectives")
_TOLERANCE = 0.02  # of bytes; counts are exact


def golden_part(result: dict[str, Any]) -> dict[str, Any]:
  return {
    "versions": result["versions"],
    "effort": result["effort"],
    **{key: result[key] for key in GOLDEN_KEYS},
  }


def write_golden(path: Path, result: dict[str, Any]) -> None:
  path.parent.mkdir(parents=True, exist_ok=True)
  path.write_text(json.dumps(golden_part(result), indent=1, sort_keys=True) + "\n")


def compare_golden(path: Path, result: dict[str, Any]) -> list[str] | None:
  """Differences, one a line; None where other versions of jax or libtpu, or another effort, made the file."""
  if not path.is_file():
    return [f"{path.name} is missing; write it with --write_golden"]
  golden = json.loads(path.read_text())
  if any(golden[key] != result[key] for key in ("versions", "effort")):
    return None
  return _differences(golden, golden_part(result), "")


def _differences(old: Any, new: Any, where: str) -> list[str]:
  if isinstance(old, dict) and isinstance(new, dict):
    found = []
    for key in sorted({*old, *new}):
      at = f"{where}/{key}" if where else key
      if key not in old:
        found.append(f"{at}: new, {json.dumps(new[key])}")
      elif key not in new:
        found.append(f"{at}: gone, was {json.dumps(old[key])}")
      else:
        found += _differences(old[key], new[key], at)
    return found
  in_bytes = "bytes" in where
  same = abs(old - new) <= _TOLERANCE * max(abs(old), 2**20) if in_bytes else old == new
  return [] if same else [f"{where}: {old} -> {new}"]


def table(result: dict[str, Any]) -> str:
  """For people."""
  gib = 2**30
  hbm, times, peak = result["hbm_bytes"], result["times"], result["hbm_peak_bytes"]
  rows = [
    ("program", f"{result['config']} {result['mode']} on {result['topology']}, {result['devices']} devices"),
    ("mesh", ", ".join(f"{axis} {n}" for axis, n in result["mesh"].items() if n > 1) or "one device"),
    ("attention", f"{result['attention']}, remat {result['remat']}"),
    ("parameters", f"{result['params']:,}"),
    ("HBM per chip", f"{peak / gib:.1f} of {result['hbm_limit_bytes'] / gib:.1f} GiB "
      f"({peak / result['hbm_limit_bytes']:.0%}): "
      + ", ".join(f"{kind.replace('_', ' ')} {n / gib:.1f}" for kind, n in hbm.items() if kind != "peak")),
    ("tokens per step", f"{result['tokens']:,} in {result['rows']} rows of {result['row_tokens']:,} "
      f"(mix {result['mix']}: {result['samples']:,} samples, fill {result['fill']:.1%}, cost imbalance of "
      f"rows {result['row_imbalance']:.2f})"),
    ("model FLOPs per step", f"{result['model_flops_per_step']:.3g}"),
    ("live-tile FLOPs", f"{result['live_tile_flops_per_step']:.3g}; "
      f"{result['live_tile_share']:.1%} of tiles live"),
    ("compiled in", f"{result['compile_seconds']:.1f} s (traced in {result['lower_seconds']:.1f} s), "
      f"{result['compile_cpu_seconds']:.0f} s of CPU"),
    ("seconds by unit", ", ".join(f"{unit} {s:.3g}" for unit, s in times.items())),
    ("roofline step", f"{result['roofline_step_seconds']:.3g} s, MFU {result['roofline_mfu']:.1%} if all "
      f"transfers overlap; {result['serial_step_seconds']:.3g} s, {result['serial_mfu']:.1%} as scheduled"),
  ]  # fmt: skip
  lines = [f"{name:<21} {value}" for name, value in rows]
  lines += [f"{'note':<21} {note}" for note in result.get("notes", ())]
  lines.append(f"{'collectives':<21} {'axes':<16} {'runs':>7} {'GB sent':>9} {'overlapped':>11}")
  for kind, by_axes in result["collectives"].items():
    for axes, cell in by_axes.items():
      share = cell["overlapped_bytes"] / cell["bytes"] if cell["bytes"] else 0.0
      lines.append(f"  {kind:<19} {axes:<16} {cell['count']:>7} {cell['bytes'] / 1e9:>9.2f} {share:>11.0%}")
  lines += [f"lint {lint['name']}: {lint['message']}" for lint in result["lints"]]
  lines.append(_verdict(result))
  return "\n".join(lines)


def refusal(result: dict[str, Any]) -> str:
  """For people, where there is no program to show figures of."""
  head = f"{result['config']} {result['mode']} on {result['topology']}, {result['devices']} devices: "
  head += f"{result['params']:,} parameters"
  return "\n".join([head, *(f"lint {x['name']}: {x['message']}" for x in result["lints"]), _verdict(result)])


def _verdict(result: dict[str, Any]) -> str:
  names = list(dict.fromkeys(lint["name"] for lint in result["lints"]))
  if not names:
    return "fits"
  return f"does NOT {'fit' if 'memory' in names else 'pass'}: {', '.join(names)}"
