"""Collectives of a compiled step: kind, mesh axes, bytes per step, and whether they run beside compute."""

import dataclasses
import itertools
import math
import re
from collections.abc import Mapping

import numpy as np

from sora_jax.rehearsal import hlo
from sora_jax.rehearsal.hlo import Instruction, Module

KINDS = ("all-gather", "all-reduce", "reduce-scatter", "all-to-all", "collective-permute")
# Work that a transfer may hide behind.
_NAMED = re.compile(r"replica_groups=(?:@?\w+)?mesh\[([^\]]*)\](?:, ?device_ids=\(([^)]*)\))? ?\{([^}]*)\}")
_BETWEEN_SLICES = re.compile(r'_xla_megascale_transfer_type="?([A-Z_]+)')
_SLICES = re.compile(r'_xla_megascale_target="\{([\d,:]+)\}x')
_COMPUTE = ("fusion", "convolution", "dot", "custom-call", "while", "call")


@dataclasses.dataclass(frozen=True, kw_only=True)
class Collective:
  kind: str
  axes: tuple[str, ...]  # mesh axes its groups span
  group: int  # devices in a group
  count: int  # runs per step
  payload: int  # bytes of the full (gathered, or yet to be reduced) array, of one run
  overlapped: bool
  exact: bool  # False inside a loop whose length depends on the data: counted once

  @property
  def bytes_per_step(self) -> float:
    """Bytes that each device sends per step, over a ring."""
    share = (self.group - 1) / self.group
    factor = {"all-reduce": 2 * share, "collective-permute": 1.0}.get(self.kind, share)
    return self.count * self.payload * factor


def find(module: Module, mesh_shape: Mapping[str, int]) -> list[Collective]:
  """Every collective of the step over more than one device; device ids are places in the flattened mesh."""
  times = hlo.runs(module)
  hidden = _hidden_computations(module)
  found = []
  for name, instructions in module.computations.items():
    count, exact = times.get(name, (0, True))
    if not count:
      continue
    for i, instruction in enumerate(instructions):
      opcode = instruction.opcode.removesuffix("-start")
      if opcode == "recv" and (kind := _BETWEEN_SLICES.search(instruction.attributes)):
        overlapped = name in hidden or _has_compute(instructions, i, instruction.name)
        found.append(_between_slices(instruction, kind[1], mesh_shape, count, overlapped, exact))
      if opcode not in KINDS:
        continue
      groups = _groups(instruction.attributes, math.prod(mesh_shape.values()))
      axes = axes_of(groups, mesh_shape)
      if not axes:
        continue
      is_scatter = opcode == "all-reduce" and name.startswith("all-reduce-scatter")
      overlapped = name in hidden or (
        instruction.opcode.endswith("-start") and _has_compute(instructions, i, instruction.name)
      )
      found.append(
        Collective(
          kind="reduce-scatter" if is_scatter else opcode,
          axes=axes,
          group=2 if opcode == "collective-permute" else groups.shape[1],
          count=count,
          payload=_payload(instruction, opcode, groups.shape[1], _result(instructions, i)),
          overlapped=overlapped,
          exact=exact,
        )
      )
  return found


def _between_slices(
  instruction: Instruction,
  kind: str,
  mesh_shape: Mapping[str, int],
  count: int,
  overlapped: bool,
  exact: bool,
) -> Collective:
  """What crosses the network is sent and received by the host: of a joint sum, the part that each device has
  already reduced within its slice. Only the outermost mesh axis spans slices (parallel/mesh.py)."""
  ids = _SLICES.search(instruction.attributes)
  slices = sum(1 + int(b or a) - int(a) for a, b in re.findall(r"(\d+)(?::(\d+))?", ids[1])) if ids else 2
  return Collective(
    kind=kind.lower().replace("_", "-") if ids else "collective-permute",
    axes=(next(iter(mesh_shape)),),
    group=slices,
    count=count,
    payload=hlo.shape_sizes(instruction.shape)[0],
    overlapped=overlapped,
    exact=exact,
  )


def axes_of(groups: np.ndarray, mesh_shape: Mapping[str, int]) -> tuple[str, ...]:
  """The mesh axes along which the members of a group differ."""
  places = np.stack(np.unravel_index(groups, tuple(mesh_shape.values())))
  varies = (places != places[:, :, :1]).any(axis=(1, 2))
  return tuple(axis for axis, v in zip(mesh_shape, varies) if v)


def _groups(attributes: str, num_devices: int) -> np.ndarray:
  """(groups, members) device ids; of a permutation, its (source, target) pairs."""
  if pairs := re.search(r"source_target_pairs=\{((?:\{\d+,\d+\},?)*)\}", attributes):
    ids = np.array(re.findall(r"\d+", pairs[1]), int)
    return ids.reshape(-1, 2)
  if listed := re.search(r"replica_groups=\{((?:\{[\d,]+\},?)+)\}", attributes):
    return np.array([[int(n) for n in group.split(",")] for group in re.findall(r"\{([\d,]+)\}", listed[1])])
  if iota := re.search(r"replica_groups=\[([\d,]+)\]<=\[([\d,]+)\](?:T\(([\d,]+)\))?", attributes):
    shape, dims = (tuple(int(n) for n in iota[k].split(",")) for k in (1, 2))
    order = tuple(int(n) for n in iota[3].split(",")) if iota[3] else tuple(range(len(dims)))
    return np.arange(math.prod(dims)).reshape(dims).transpose(order).reshape(shape)
  if named := re.search(
    r"replica_groups=(?:@?\w+)?mesh\[([^\]]*)\](?:, ?device_ids=\(([^)]*)\))? ?\{([^}]*)\}", attributes
  ):
    return _named_groups(named)
  return np.arange(num_devices)[None]


def _named_groups(match: re.Match) -> np.ndarray:
  """mesh['a'=4,'b'=2] {'b'}: groups along the named axes of a mesh of the partitioner's own."""
  sizes = {axis: int(size) for axis, size in re.findall(r"'([^']+)'=(\d+)", match[1])}
  along = re.findall(r"'([^']+)'", match[3])
  names = list(sizes)
  ids = np.arange(math.prod(sizes.values())).reshape(tuple(sizes.values()))
  order = [names.index(n) for n in names if n not in along] + [names.index(n) for n in along]
  members = math.prod(sizes[n] for n in along)
  return ids.transpose(order).reshape(-1, members)


def _result(instructions: list[Instruction], start: int) -> str:
  """The shape of the results alone, which of an async start its done has: several arrays may go as one."""
  name = instructions[start].name
  dones = (i.shape for i in instructions[start + 1 :] if i.opcode.endswith("-done") and name in i.operands)
  return next(dones, "") if instructions[start].opcode.endswith("-start") else ""


def _payload(instruction: Instruction, opcode: str, group: int, result: str) -> int:
  """Bytes of the whole array on one device: gathered, or before it is reduced, exchanged or sent."""
  if result:
    return sum(hlo.shape_sizes(result)) * (group if opcode == "reduce-scatter" else 1)
  sizes = hlo.shape_sizes(instruction.shape)
  if opcode == "collective-permute":
    return sizes[0]
  if instruction.opcode.endswith("-start") and opcode != "all-reduce":  # (operands, results, ...)
    return max(sizes)
  total = sum(sizes)
  return total * group if opcode == "reduce-scatter" else total


def _has_compute(instructions: list[Instruction], start: int, name: str) -> bool:
  """Whether anything is computed between a start and its done."""
  between = itertools.takewhile(
    lambda i: not (i.opcode.endswith("-done") and name in i.operands), instructions[start + 1 :]
  )
  return any(i.opcode in _COMPUTE for i in between)


def _hidden_computations(module: Module) -> set[str]:
  """Computations that run beside others: bodies of async starts with work before their done, and the fusions
  into which the TPU compiler weaves a collective and compute."""
  hidden = set()
  for instructions in module.computations.values():
    for i, instruction in enumerate(instructions):
      is_async = instruction.opcode == "async-start" and _has_compute(instructions, i, instruction.name)
      is_woven = instruction.opcode == "fusion" and "async_collective" in " ".join(
        instruction.called("calls")
      )
      if is_async or is_woven:
        hidden.update(instruction.called("calls", "called_computations"))
  return hidden


def table(collectives: list[Collective]) -> dict[str, dict[str, dict[str, float]]]:
  """kind -> axes joined by "+" -> {count, bytes, overlapped_bytes} per step and device."""
  result: dict[str, dict[str, dict[str, float]]] = {}
  for c in sorted(collectives, key=lambda c: (KINDS.index(c.kind), c.axes)):
    cell = result.setdefault(c.kind, {}).setdefault(
      "+".join(c.axes), {"count": 0, "bytes": 0, "overlapped_bytes": 0}
    )
    cell["count"] += c.count
    cell["bytes"] += round(c.bytes_per_step)
    cell["overlapped_bytes"] += round(c.bytes_per_step) if c.overlapped else 0
  return result
