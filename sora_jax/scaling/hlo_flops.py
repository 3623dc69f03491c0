"""FLOPs of the matrix products in a compiled program, loop bodies times their trips.

XLA's own cost analysis counts the body of a loop once, and all elementwise work with it.
"""

import collections
import math
import re

_COMPUTATION = re.compile(r"^(?:ENTRY )?%?([\w.\-]+) \(.*\{$")
_INSTRUCTION = re.compile(r"^\s+(?:ROOT )?%?([\w.\-]+) = (?:\()?\w+\[([\d,]*)\]")
_CALLED = re.compile(r"(?:calls|to_apply|body|true_computation|false_computation)=%?([\w.\-]+)")
_BRANCHES = re.compile(r"branch_computations=\{([^}]*)\}")
_TRIPS = re.compile(r'"known_trip_count":\{"n":"(\d+)"\}')
_DOT = re.compile(r" dot\(([^)]*)\).*lhs_contracting_dims=\{([\d,]*)\}")
_NAME = re.compile(r"%([\w.\-]+)")


def matmul_flops(hlo: str) -> float:
  """2 FLOPs a multiply-add of every `dot` that one run of the module executes (`compiled.as_text()`)."""
  if "custom_call_target" in hlo and re.search(r'custom_call_target="[^"]*(gemm|matmul|dot)', hlo, re.I):
    raise ValueError("matrix products inside custom calls: their FLOPs cannot be read from the module")
  own: dict[str, float] = collections.defaultdict(float)
  calls: dict[str, list[tuple[str, int]]] = collections.defaultdict(list)
  name, entry, shapes = "", "", {}
  for line in hlo.splitlines():
    if match := _COMPUTATION.match(line):
      name, shapes = match[1], {}
      entry = name if line.startswith("ENTRY") else entry
      continue
    if match := _INSTRUCTION.match(line):
      shapes[match[1]] = _dims(match[2])
      if dot := _DOT.search(line):
        left = _operand(dot[1], shapes)
        own[name] += 2.0 * math.prod(shapes[match[1]]) * math.prod(left[i] for i in _dims(dot[2]))
    trips = int(found[1]) if " while(" in line and (found := _TRIPS.search(line)) else 1
    calls[name] += [(callee, trips) for callee in _CALLED.findall(line)]
    for branches in _BRANCHES.findall(line):
      calls[name] += [(callee, 1) for callee in _NAME.findall(branches)]
  totals: dict[str, float] = {}

  def total(computation: str) -> float:
    if computation not in totals:
      totals[computation] = own[computation] + sum(n * total(c) for c, n in calls[computation])
    return totals[computation]

  return total(entry)


def _dims(text: str) -> tuple[int, ...]:
  return tuple(int(n) for n in text.split(",") if n)


def _operand(operands: str, shapes: dict[str, tuple[int, ...]]) -> tuple[int, ...]:
  """Shape of the first operand, which some versions write out and others only name."""
  if match := re.match(r"\w+\[([\d,]*)\]", operands):
    return _dims(match[1])
  return shapes[_NAME.match(operands)[1]]
