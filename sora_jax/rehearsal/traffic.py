"""Bytes that a compiled step moves between HBM and the cores, estimated from its instructions."""

from sora_jax.rehearsal import hlo
from sora_jax.rehearsal.hlo import Instruction, Module

_FREE = (
  "parameter", "constant", "tuple", "get-tuple-element", "bitcast", "while", "conditional", "call", "iota",
  "after-all", "partition-id", "copy-done", "all-gather-done", "all-reduce-done", "collective-permute-done",
  "reduce-scatter-done", "all-to-all-done",
  "async-done", "async-update", "optimization-barrier",
)  # fmt: skip


def hbm_bytes(module: Module) -> float:
  """Every result outside a fusion written once and read once; updates in place count what they change.

  A result that stays in VMEM (memory space 1) costs nothing. Loops that depend on the data count once.
  """
  times = hlo.runs(module)
  fused = {
    name
    for instructions in module.computations.values()
    for i in instructions
    if i.opcode not in ("while", "call", "conditional")
    for name in i.called()
  }
  total = 0.0
  for name, instructions in module.computations.items():
    if name in fused or name not in times:
      continue
    for instruction in instructions:
      if instruction.opcode not in _FREE and "S(1)" not in instruction.shape:
        total += 2.0 * times[name][0] * _written(module, instruction)
  return total


def _written(module: Module, instruction: Instruction) -> int:
  if instruction.opcode == "dynamic-update-slice":
    return 0  # its update was counted where it was made
  if instruction.opcode == "fusion":
    inner = module.computations[instruction.called("calls")[0]]
    root = inner[-1]
    if root.opcode == "dynamic-update-slice":
      shapes = {i.name: i.shape for i in inner}
      return sum(hlo.shape_sizes(shapes.get(root.operands[1], "")))
  return sum(hlo.shape_sizes(instruction.shape))
