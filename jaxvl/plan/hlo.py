"""The collectives of a compiled program, read from its HLO text: what each moves, between which devices, how often a step.

XLA's own counts take the body of a loop once. Here every instruction counts as often as it runs: a loop's body times its trip count,
which XLA notes on the loop or which its condition tells. Of a conditional only what every branch does is sure; what one branch does beyond
that, such as a clustering once an epoch, is told apart, and so is what lies in a loop whose length only the data know.
"""

import math
import re
from collections import defaultdict
from collections.abc import Iterator, Sequence
from typing import NamedTuple

import numpy as np

KINDS = ("all-reduce", "all-gather", "reduce-scatter", "collective-permute", "all-to-all")
BITS = {"pred": 8, "token": 0, "c64": 64, "c128": 128}  # of what does not carry its number of bits in its name


class Collective(NamedTuple):
    """One kind of transfer among one kind of group, all of its instructions together.

    axes: of the mesh, that a group spans. devices: in a group. times: how often a step. bytes: of the whole arrays a step, on each device. sent: that a
    device must send a step, the least that a ring needs. sure: False for what not every step does, once of which is counted.
    """

    kind: str
    axes: tuple[str, ...]
    devices: int
    times: int
    bytes: int
    sent: int
    sure: bool = True


class Instruction(NamedTuple):
    name: str
    type: str
    opcode: str
    argument: str  # between its parentheses
    attributes: str  # after them


Computations = dict[str, list[Instruction]]


def collectives(text: str, mesh: dict[str, int]) -> list[Collective]:
    """Of the program of `text` (Compiled.as_text()) on a mesh of these axis sizes in order. Raises ValueError for text that is no HLO module."""
    computations, entry = parse(text)
    types = {i.name: i.type for body in computations.values() for i in body}
    found: dict[tuple, list[float]] = defaultdict(lambda: [0, 0, 0])
    for instruction, kind, times, sure in _run(computations, entry, 1, True):
        groups, together = _groups(instruction, mesh)
        n = len(groups[0]) if together else 2
        given = sum(type_bytes(types[name]) for name in re.findall(r"%([\w.\-]+)", instruction.argument))
        whole = given * n if kind == "all-gather" else given
        share = {
            "all-reduce": 2 * (n - 1) / n,
            "all-gather": (n - 1) / n,
            "reduce-scatter": (n - 1) / n,
            "all-to-all": (n - 1) / n,
            "collective-permute": 1.0,
        }[kind]
        total = found[kind, _axes(groups, mesh), n if together else len({d for pair in groups for d in pair}), sure]
        for i, value in enumerate((times, times * whole, times * whole * share)):
            total[i] += value
    rows = [
        Collective(kind, axes, n, int(count), round(size), round(sent), sure)
        for (kind, axes, n, sure), (count, size, sent) in found.items()
        if n > 1
    ]
    return sorted(rows, key=lambda c: (not c.sure, -c.sent))


def parse(text: str) -> tuple[Computations, str]:
    """The computations of a module by name, and the name of the one it begins with."""
    computations: Computations = {}
    entry, body = "", None
    for line in text.splitlines():
        head = re.match(r"(ENTRY )?%?([\w.\-]+) (?:\(.*\) -> .*)?\{$", line)
        if head and not line.startswith(" "):
            body = computations.setdefault(head[2], [])
            entry = head[2] if head[1] else entry
        elif line.startswith("}"):
            body = None
        elif body is not None and (found := _instruction(line)):
            body.append(found)
    if not entry:
        raise ValueError("the text is no HLO module: it has no ENTRY")
    return computations, entry


def type_bytes(text: str) -> int:
    """Bytes of an array or tuple type such as "(f32[2,3]{1,0}, bf16[8]{0})", without padding."""
    total = 0.0
    for dtype, dims in re.findall(r"\b([a-z]\w*)\[([\d,]*)\]", text):
        bits = BITS[dtype] if dtype in BITS else int(re.findall(r"\d+", dtype)[0])
        total += bits / 8 * math.prod(int(d) for d in dims.split(",") if d)
    return math.ceil(total)


def _instruction(line: str) -> Instruction | None:
    match = re.match(r"\s+(?:ROOT )?%?([\w.\-]+) = ", line)
    if not match:
        return None
    line = re.sub(r"/\*.*?\*/", "", line)
    at = match.end()
    end = _closing(line, at) + 1 if line[at] == "(" else line.index(" ", at)
    type_, opening = line[at:end], line.index("(", end)
    close = _closing(line, opening)
    return Instruction(match[1], type_, line[end:opening].strip(), line[opening + 1 : close], line[close + 1 :])


def _closing(line: str, at: int) -> int:
    depth = 0
    for i in range(at, len(line)):
        depth += {"(": 1, ")": -1}.get(line[i], 0)
        if not depth:
            return i
    raise ValueError(f"the HLO text has an instruction without its end: {line.strip()[:120]}")


def _run(computations: Computations, name: str, times: int, sure: bool) -> Iterator[tuple[Instruction, str, int, bool]]:
    """(instruction, kind, times, sure) of every collective that `times` runs of a computation make."""
    for i in computations.get(name, ()):
        kind = i.opcode.removesuffix("-start")
        if kind in KINDS:
            # On TPU an all-reduce of which each device keeps a slice is a computation of its own, and one transfer.
            yield i, "reduce-scatter" if name.startswith("all-reduce-scatter") else kind, times, sure
        elif i.opcode == "while":
            n = _trips(i, computations)
            yield from _run(computations, _called(i, "body"), times * (n or 1), sure and n is not None)
        elif i.opcode == "conditional":
            yield from _branches([list(_run(computations, branch, times, sure)) for branch in _called_all(i)])
        elif i.opcode in ("fusion", "call", "async-start"):
            yield from _run(computations, _called(i, "calls") or _called(i, "to_apply"), times, sure)


def _branches(branches: Sequence[list]) -> Iterator:
    """The branch that moves least is sure; what the others do is not."""
    least = min(branches, key=lambda found: sum(type_bytes(i.type) * times for i, _, times, _ in found), default=[])
    yield from least
    for found in branches:
        if found is not least:
            yield from ((i, kind, times, False) for i, kind, times, _ in found)


def _called(i: Instruction, key: str) -> str:
    match = re.search(rf"\b{key}=%?([\w.\-]+)", i.attributes)
    return match[1] if match else ""


def _called_all(i: Instruction) -> list[str]:
    listed = re.search(r"branch_computations=\{(.*?)\}", i.attributes)
    return re.findall(r"%?([\w.\-]+)", listed[1]) if listed else [_called(i, f"{side}_computation") for side in ("true", "false")]


def _trips(i: Instruction, computations: Computations) -> int | None:
    """How often a loop runs: as XLA notes it, else the one constant that its condition compares a counter with; None where neither tells."""
    if noted := re.search(r'"known_trip_count":\{"n":"(\d+)"', i.attributes):
        return int(noted[1])
    condition = _called(i, "condition")
    inside = [c for c in computations.get(condition, ()) for c in [c, *computations.get(_called(c, "calls"), ())]]
    compares = [c for c in inside if c.opcode == "compare"]
    bounds = {int(c.argument) for c in inside if c.opcode == "constant" and c.type.startswith("s32[]")}
    return bounds.pop() if len(compares) == 1 and len(bounds) == 1 and "direction=LT" in compares[0].attributes else None


def _groups(i: Instruction, mesh: dict[str, int]) -> tuple[list[list[int]], bool]:
    """Which devices talk: groups that share (True), or pairs of source and target (False)."""
    devices = math.prod(mesh.values())
    if pairs := re.search(r"source_target_pairs=\{(.*?\})\}", i.attributes):
        return [[int(d) for d in pair.split(",")] for pair in re.findall(r"\{([\d,]+)\}", pairs[1])], False
    if iota := re.search(r"replica_groups=\[([\d,]+)\]<=\[([\d,]+)\](?:T\(([\d,]+)\))?", i.attributes):
        shape, source, order = ([int(n) for n in part.split(",")] if part else None for part in iota.groups())
        ids = np.arange(math.prod(source or ())).reshape(source or ())
        return (ids.transpose(order) if order else ids).reshape(shape or ()).tolist(), True
    if named := re.search(r"replica_groups=mesh\[([^\]]*)\](?:, device_ids=\(\[([\d,]+)\](?:T\(([\d,]+)\))?\))? \{([^}]*)\}", i.attributes):
        known = {axis: int(size) for axis, size in re.findall(r"'([^']+)'=(\d+)", named[1])}
        inside = [part.strip().strip("'") for part in named[4].split(",")]
        if set(inside) <= set(known):  # an axis may also be cut in parts, which nothing here asks for
            axes = [k for k, axis in enumerate(known) if axis not in inside] + [list(known).index(axis) for axis in inside]
            n, sizes = math.prod(known[axis] for axis in inside), tuple(known.values())
            dims = tuple(int(k) for k in named[2].split(",")) if named[2] else sizes
            ids = np.arange(math.prod(sizes)).reshape(dims)  # the mesh's devices in its own order, where that is not ascending
            ids = ids.transpose([int(k) for k in named[3].split(",")]) if named[3] else ids
            return ids.reshape(sizes).transpose(axes).reshape(-1, n).tolist(), True
    listed = re.search(r"replica_groups=\{((?:\{[\d,]*\},?)*)\}", i.attributes)
    if listed is None:
        raise ValueError(f"a {i.opcode} of the compiled program names its devices in a way that is not known here: {i.attributes[:200]}")
    return [[int(d) for d in group.split(",")] for group in re.findall(r"\{([\d,]+)\}", listed[1])] or [list(range(devices))], True


def _axes(groups: list[list[int]], mesh: dict[str, int]) -> tuple[str, ...]:
    """The axes along which the devices of a group differ."""
    places = np.stack(np.unravel_index(np.array(groups), tuple(mesh.values())), -1)  # group, member, axis
    return tuple(axis for axis, differ in zip(mesh, (places != places[:, :1]).any((0, 1)), strict=True) if differ)
