"""The chips that a run can be planned for, and what a topology such as v5e:16x16 names.

Figures are those of the makers, of one JAX device (for TPU v4 and newer, one chip; of v7, one of a chip's two): HBM and interconnect from
Google Cloud's page of each TPU version and from NVIDIA's data sheets, the peak from `report/clock.py`. `link` is what a chip can send a second over
all its links, one way: half of the figure that counts both ways. Beyond `node` chips, GPUs talk through the network, taken as 400 Gb/s a GPU.
"""

import difflib
import math
import re
from typing import NamedTuple

from jaxvl.report.clock import peak_flops

GIB, GB = 1 << 30, 10**9
NETWORK = 50 * GB


class Chip(NamedTuple):
    """hbm: bytes. peak: dense bfloat16 FLOP/s; link: bytes/s; 0 for a chip (the CPU) that has no such figure. libtpu: whether it compiles for it. kind: the
    beginning of JAX's name of the device."""

    name: str
    hbm: int
    peak: float
    link: float
    libtpu: bool = False
    dims: int = 1
    node: int = 0
    kind: str = ""


class Topology(NamedTuple):
    name: str
    chip: Chip
    devices: int


def _tpu(name: str, kind: str, hbm: float, link: float, dims: int) -> Chip:
    return Chip(name, int(hbm * GIB), peak_flops(kind) or 0.0, link * GB, True, dims, kind=kind)


def _gpu(name: str, kind: str, hbm: float, link: float) -> Chip:
    return Chip(name, int(hbm * GB), peak_flops(kind) or 0.0, link * GB, node=8, kind=f"NVIDIA {kind}")


# TPU: cloud.google.com/tpu/docs/v4, v5e, v5p, v6e (HBM, and "interchip interconnect" in Gbit/s / 8). GPU: data sheets, NVLink / 2.
CHIPS = {
    chip.name: chip
    for chip in (
        _tpu("v4", "TPU v4", 32, 300, 3),
        _tpu("v5e", "TPU v5 lite", 16, 200, 2),
        _tpu("v5p", "TPU v5", 95, 600, 3),
        _tpu("v6e", "TPU v6 lite", 32, 448, 2),
        _gpu("a100", "A100", 80, 300),
        _gpu("h100", "H100", 80, 450),
        _gpu("h200", "H200", 141, 450),
        _gpu("b200", "B200", 180, 900),
        Chip("cpu", 0, 0.0, 0.0, kind="cpu"),
    )
}


def topology(text: str) -> Topology:
    """v5e:16x16, v5p:4x4x4, cpu:8, h100:8. Raises ValueError naming what is wrong and what would be right."""
    name, _, size = text.partition(":")
    if name not in CHIPS:
        near = difflib.get_close_matches(name, CHIPS, 1)
        raise ValueError(
            f"--topology={text}: no chip is called {name!r}{f'; did you mean {near[0]!r}?' if near else ''}; there are {', '.join(CHIPS)}"
        )
    chip = CHIPS[name]
    example = f"{name}:{'x'.join(['4'] * chip.dims) if chip.dims > 1 else 8}"
    if not re.fullmatch(r"[1-9]\d*" + r"x[1-9]\d*" * (chip.dims - 1), size):
        what = f"{chip.dims} sizes joined by x" if chip.dims > 1 else "one number of devices"
        raise ValueError(f"--topology={text}: after {name}: come {what}, as in {example}")
    return Topology(text, chip, math.prod(int(n) for n in size.split("x")))


def here(kind: str, devices: int, memory: int) -> Topology:
    """The topology that a run is on: devices of a kind as JAX names it; `memory` is the bytes that a device says it has, 0 where it does not say."""
    chip = next(
        (c for c in sorted(CHIPS.values(), key=lambda c: -len(c.kind)) if kind.startswith(c.kind)),
        Chip(kind, 0, peak_flops(kind) or 0.0, 0.0),
    )
    return Topology(f"{chip.name}:{devices}", chip._replace(hbm=memory or chip.hbm), devices)
