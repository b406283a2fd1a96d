"""A plan as a person reads it, and as JSON."""

from collections.abc import Iterable, Sequence
from typing import Any

from jaxvl.plan import fit
from jaxvl.plan.fit import Plan
from jaxvl.plan.shapes import GROUPS

NAMES = {**GROUPS, "counters": "step, key, position", "batch": "batch"}


def as_json(plan: Plan) -> dict[str, Any]:
    """Every field of the plan, and what follows from them."""
    bounds = fit.mfu_bounds(plan)
    return {
        **plan._asdict(),
        "collectives": [c._asdict() for c in plan.collectives],
        "batch": plan.batch and plan.batch._asdict(),
        "fits": plan.fits,
        "mfu_at_most": bounds and bounds[0],
        "mfu_if_nothing_overlaps": bounds and bounds[1],
        "accumulate_that_may_fit": fit.cuts(plan),
        "layouts": [{**layout._asdict(), "total_estimated": total, "fits_estimated": fits} for layout, total, fits in fit.advice(plan)],
    }


def lines(plan: Plan) -> Iterable[str]:
    """The plan for a terminal."""
    mesh = ", ".join(f"{axis} {size}" for axis, size in plan.mesh.items())
    cut = f" in {plan.accumulate} microbatches" if plan.accumulate > 1 else ""
    yield f"{plan.config} on {plan.topology}: mesh {mesh}; batch {plan.batch_size:,}{cut}; {plan.parameters:,} parameters"
    times = ", ".join(f"{phase} {seconds:.0f} s" for phase, seconds in plan.seconds.items())
    yield f"{plan.source}{f' ({times})' if times else ''}"
    yield from (f"note: {note}" for note in plan.notes)
    yield ""
    yield "memory of a device"
    rows = [(NAMES[group], size) for group, size in plan.held.items()] + [
        ("activations and other temporaries", plan.temporary),
        ("padding, code, results", plan.other),
    ]
    yield from _aligned([(name, size_text(size)) for name, size in rows if size] + [("total", size_text(plan.total))])
    yield f"  {verdict(plan)}"
    if plan.batch:
        end = "the next that was tried does not" if plan.batch.sure else "no larger one was tried; more --compiles may find it"
        tried = ", ".join(f"{size:,}: {size_text(total)}" for size, total in sorted(plan.batch.tried.items()))
        yield (
            f"  largest batch that fits: {plan.batch.largest:,} ({end})"
            if plan.batch.largest
            else "  no batch that was tried fits; fewer rows may"
        )
        yield f"  tried: {tried}"
    yield ""
    yield "collectives of a step, on each device"
    sure = [c for c in plan.collectives if c.sure]
    yield from _aligned([("kind", "over", "devices", "times", "bytes", "sent")] + [
        (c.kind + ("" if c.sure else " (not in every step)"), "*".join(c.axes), str(c.devices), f"{c.times:,}", size_text(c.bytes), size_text(c.sent)) for c in plan.collectives
    ])  # fmt: skip
    yield ""
    yield f"{plan.flops:.3g} FLOPs a step, {plan.flops / plan.batch_size:.3g} a sample; {size_text(sum(c.sent for c in sure))} sent by each device"
    if bounds := fit.mfu_bounds(plan):
        compute, send = plan.compute_s or 0.0, plan.send_s or 0.0
        ratio = f"{compute / send:.1f}" if send else "no sending"
        yield f"compute {compute * 1e3:.1f} ms at the peak, sending {send * 1e3:.1f} ms, ratio {ratio}: MFU at most {bounds[0]:.2f}, {bounds[1]:.2f} if nothing overlaps"
    yield ""
    yield "meshes to try, estimated from shapes (sent: gradients and split parameters; what tensor sums inside layers is not in it)"
    yield from _aligned([("data", "fsdp", "tensor", "memory", "fits", "sent")] + [
        (*(str(n) for n in layout.mesh.values()), size_text(total), {True: "yes", False: "no", None: ""}[fits], size_text(layout.sent)) for layout, total, fits in fit.advice(plan)[:5]
    ])  # fmt: skip


def verdict(plan: Plan) -> str:
    """Whether it fits, and if not, what may help."""
    if plan.fits is None:
        return "a CPU has no memory of its own to fit in"
    share = f"{size_text(plan.total)} of {size_text(plan.hbm)}"
    if plan.fits:
        return f"FITS: {share}, {100 * plan.total / plan.hbm:.0f} %"
    if sum(plan.held.values()) > plan.hbm:
        return f"DOES NOT FIT: {share}; the state alone is more than there is: split it, by mesh.fsdp or more devices"
    cut = fit.cuts(plan)
    return f"DOES NOT FIT: {share}" + (f"; by estimate train.accumulate={cut} would" if cut else "")


def size_text(size: int) -> str:
    """1.5 GiB."""
    unit = next((u for u in ("GiB", "MiB", "KiB") if abs(size) >= _UNITS[u]), "")
    return f"{size / _UNITS[unit]:.{2 if unit == 'GiB' else 1}f} {unit}" if unit else f"{size} B"


_UNITS = {"GiB": 1 << 30, "MiB": 1 << 20, "KiB": 1 << 10}


def _aligned(rows: Sequence[tuple[str, ...]]) -> Iterable[str]:
    widths = [max(len(row[i]) for row in rows) for i in range(len(rows[0]))]
    for row in rows:
        yield (
            "  "
            + "  ".join(
                text.ljust(w) if i == 0 or (len(row) > 2 and i == 1) else text.rjust(w)
                for i, (text, w) in enumerate(zip(row, widths, strict=True))
            ).rstrip()
        )
