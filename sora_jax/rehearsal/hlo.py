"""The text of a compiled, scheduled XLA module: its instructions, and how often each one runs.

Only what a count of collectives needs: names, shapes, operands, called computations and trip counts.
"""

import dataclasses
import math
import re

BYTES = {
  "pred": 1, "s4": 0.5, "u4": 0.5, "s8": 1, "u8": 1, "f8e4m3fn": 1, "f8e5m2": 1, "s16": 2, "u16": 2, "f16": 2,
  "bf16": 2, "s32": 4, "u32": 4, "f32": 4, "s64": 8, "u64": 8, "f64": 8, "c64": 8, "c128": 16,
}  # fmt: skip
_SHAPE = re.compile(r"\b([a-z]+\d*[a-z0-9]*)\[([\d,]*)\]")
_INSTRUCTION = re.compile(r"^\s+(?:ROOT )?%([\w.-]+) = ")
_HEAD = re.compile(r"^(?:(ENTRY) )?%([\w.-]+) \(.*\{\s*$")
_CALLED = re.compile(
  r"\b(calls|to_apply|body|condition|branch_computations|called_computations)=(%[\w.-]+|\{[^}]*\})"
)


@dataclasses.dataclass(frozen=True)
class Instruction:
  name: str
  opcode: str
  shape: str  # as printed, a tuple in parentheses
  operands: tuple[str, ...]
  attributes: str

  def called(self, *kinds: str) -> list[str]:
    found = []
    for kind, value in _CALLED.findall(self.attributes):
      if not kinds or kind in kinds:
        found += re.findall(r"%([\w.-]+)", value)
    return found


@dataclasses.dataclass(frozen=True)
class Module:
  computations: dict[str, list[Instruction]]  # in the order of the schedule
  entry: str


def shape_sizes(shape: str) -> list[int]:
  """Bytes of every array of a shape or tuple of shapes."""
  return [
    int(BYTES[kind] * math.prod(int(n) for n in dims.split(",") if n))
    for kind, dims in _SHAPE.findall(shape)
    if kind in BYTES
  ]


def parse(text: str) -> Module:
  computations, entry, current = {}, "", None
  for line in text.splitlines():
    if head := _HEAD.match(line):
      current = computations[head[2]] = []
      entry = head[2] if head[1] else entry
    elif current is not None and (match := _INSTRUCTION.match(line)):
      current.append(_instruction(match[1], line[match.end() :]))
  assert entry, "no ENTRY computation in the module"
  return Module(computations, entry)


def _instruction(name: str, rest: str) -> Instruction:
  end = _balanced(rest, 0) if rest.startswith("(") else rest.index(" ")
  shape, rest = rest[:end], rest[end:].lstrip()
  opening = rest.index("(")
  closing = _balanced(rest, opening)
  operands = tuple(re.findall(r"%([\w.-]+)", rest[opening:closing]))
  opcode = rest[:opening]
  # Of a constant the number is all that counts.
  attributes = rest[opening + 1 : closing - 1] if opcode == "constant" else rest[closing:]
  return Instruction(name, opcode, shape, operands, attributes)


def _balanced(text: str, start: int) -> int:
  """The index after the parenthesis that closes the one at `start`."""
  depth = 0
  for match in re.compile(r"[()]").finditer(text, start):
    depth += 1 if match[0] == "(" else -1
    if depth == 0:
      return match.end()
  raise AssertionError(f"unbalanced: {text[:80]}")


def trip_count(module: Module, loop: Instruction) -> int | None:
  """How often a while body runs; None where that depends on the data."""
  if known := re.search(r'known_trip_count"?[:=]\{"?n"?[:=]"?(\d+)', loop.attributes):
    return int(known[1])
  (condition,) = loop.called("condition")
  body = module.computations[condition]
  by_name = {i.name: i for i in body}
  root = body[-1]
  if root.opcode == "fusion" and root.called("calls"):
    inner = module.computations[root.called("calls")[0]]
    parameters = [i for i in inner if i.opcode == "parameter"]
    for parameter, operand in zip(parameters, root.operands):
      by_name[parameter.name] = by_name.get(operand)
    by_name |= {i.name: i for i in inner if i.opcode != "parameter"}
    root = inner[-1]
  if root.opcode != "compare" or "direction=LT" not in root.attributes:
    return None
  return _constant(by_name.get(root.operands[1]))


def _constant(instruction: Instruction | None) -> int | None:
  if instruction is None or instruction.opcode != "constant":
    return None
  value = re.fullmatch(r"-?\d+", instruction.attributes)
  return int(value[0]) if value else None


def runs(module: Module) -> dict[str, tuple[int, bool]]:
  """Computation -> how often a step runs it, and whether that is exact (False inside data-dependent loops,
  which count once). Branches of a conditional count as if all ran."""
  counts: dict[str, list] = {}

  def visit(name: str, times: int, exact: bool) -> None:
    old = counts.get(name, [0, True])
    counts[name] = [old[0] + times, old[1] and exact]
    for instruction in module.computations[name]:
      if instruction.opcode == "while":
        trips = trip_count(module, instruction)
        for inner in instruction.called("body"):
          visit(inner, times * (1 if trips is None else trips), exact and trips is not None)
      elif instruction.opcode not in ("all-reduce", "reduce-scatter", "reduce", "scatter", "sort", "map"):
        for inner in instruction.called("calls", "to_apply", "branch_computations", "called_computations"):
          visit(inner, times, exact)

  visit(module.entry, 1, True)
  return {name: (times, exact) for name, (times, exact) in counts.items()}
