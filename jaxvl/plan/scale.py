"""`jaxvl plan --table`: what the large recipes need on 8, 64 and 256 chips, as the table of the README.

Every row is a plan of its own; the folder keeps it as JSON, so that a table that was cut short goes on, and is read again only for the program that it
was made of: one with the same state, batch, mesh, FLOPs and modelled temporaries.
"""

import json
from collections.abc import Iterable
from pathlib import Path
from typing import Any, NamedTuple

from jaxvl import config as configs
from jaxvl.data.lists import read_object
from jaxvl.plan import chips, fit, tell
from jaxvl.progress import progress, say

CHIPS = ("v5p:2x2x2", "v5p:4x4x4", "v5p:4x8x8")


class Row(NamedTuple):
    config: str
    topology: str
    overrides: tuple[str, ...] = ()


# The published batch of each recipe; on few chips in microbatches where the method can be cut. HPL's 120 images do not divide over more than 8
# chips, so there a chip keeps its 15.
ROWS = tuple(
    Row(f"configs/{name}.py", topology, tuple(overrides.get(i, ())))
    for name, overrides in (
        ("clip_vitb16_cc12m", {0: ("train.accumulate=4",)}),
        ("tcl_cc12m", {0: ("train.accumulate=4", "method.chunks=4")}),
        ("lexvla_cc12m", {0: ("train.accumulate=8",)}),
        ("hpl_sop", {1: ("train.batch_size=960",), 2: ("train.batch_size=3840", "method.pad_to=256")}),
    )
    for i, topology in enumerate(CHIPS)
)
SAME = ("topology", "mesh", "batch_size", "accumulate", "held", "flops", "parameters")


def table(folder: Path, *, limit: float, estimate: bool, rows: Iterable[Row] = ROWS) -> str:
    """The table in Markdown. estimate: rows that the folder does not hold are modelled from shapes instead of compiled, and say so."""
    lines = [
        "| recipe | chips | batch | state, GiB | temporaries, GiB | fits | sent a step by each chip | compute / send, ms | ratio | from |",
        "|" + "---|" * 10,
    ]
    folder.mkdir(parents=True, exist_ok=True)
    for row in progress(list(rows), "plans", unit="rows"):
        try:
            lines.append(_line(row, _kept(row, folder, limit, estimate)))
        except ValueError as error:
            say(f"{row.config} on {row.topology}: {error}")
            lines.append(f"| {Path(row.config).stem} | {row.topology} | | | | | | | | {str(error).splitlines()[0]} |")
    return "\n".join(lines)


def _kept(row: Row, folder: Path, limit: float, estimate: bool) -> dict[str, Any]:
    config, topology = configs.load(row.config, row.overrides), chips.topology(row.topology)
    modelled = json.loads(json.dumps(tell.as_json(fit.make(config, row.config, topology, compiles=1, limit=limit, estimate=True))))
    file = folder / f"{Path(row.config).stem}-{row.topology.replace(':', '_')}.json"
    if file.is_file():
        found = read_object(file, *SAME)
        if all(found[key] == modelled[key] for key in SAME) and found.get("modelled") == modelled["temporary"]:
            return found
        say(f"{file} is of another program than {row.config} is now; it is made anew")
    if estimate:
        return modelled
    made = {**tell.as_json(fit.make(config, row.config, topology, compiles=1, limit=limit)), "modelled": modelled["temporary"]}
    partial = file.with_suffix(".partial")
    partial.write_text(json.dumps(made, indent=1))
    partial.rename(file)
    return read_object(file)


def _line(row: Row, plan: dict[str, Any]) -> str:
    gib = lambda size: f"{size / 2**30:.2f}"
    state = sum(size for group, size in plan["held"].items() if group != "batch")
    cut = f" / {plan['accumulate']}" if plan["accumulate"] > 1 else ""
    moved: dict[str, int] = {}
    for c in plan["collectives"]:
        if c["sure"]:
            moved[c["kind"]] = moved.get(c["kind"], 0) + c["sent"]
    sent = (
        ", ".join(f"{kind} {tell.size_text(size)}" for kind, size in sorted(moved.items(), key=lambda item: -item[1]) if size >= 2**20)
        or "none above 1 MiB"
    )
    compute, send = 1e3 * (plan["compute_s"] or 0), 1e3 * (plan["send_s"] or 0)
    share = f"{'yes' if plan['fits'] else 'no'}, {100 * plan['total'] / plan['hbm']:.0f} %"
    ratio = f"{compute / send:.1f}" if send else ""
    source = "compiled" if plan["source"].startswith("compiled") else "model"
    return " | ".join(
        (
            "| " + Path(row.config).stem,
            row.topology,
            f"{plan['batch_size']:,}{cut}",
            gib(state),
            gib(plan["temporary"]),
            share,
            sent,
            f"{compute:.0f} / {send:.1f}",
            ratio,
            source + " |",
        )
    )
