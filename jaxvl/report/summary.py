"""A run in words: its line in the log, its last line, and the tables at its end."""

import re
import statistics
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any, NamedTuple

from jaxvl.progress import duration
from jaxvl.report.goodput import KINDS, Session, account, between
from jaxvl.terminal import table, tell

RECALL = re.compile(r"(?:(?P<eval>.+)/)?(?P<way>i2t|t2i)/r@(?P<k>\d+)")
GROUPED = re.compile(r"(?P<eval>[^/]+)/grouped_by/(?P<group>.+)")  # names what made items right beside the numbers of an evaluation
CHANCE = re.compile(r"(?P<eval>[^/]+)/(?P<way>i2t|t2i)/chance_r@(?P<k>\d+)")
WAYS = {"i2t": "image-to-text", "t2i": "text-to-image"}
KEPT_OUT = ("step", "samples", "epoch")
LOWER = re.compile(r"loss|rank|error|perplexity")  # metrics of which less is better


class Final(NamedTuple):
    """A metric over a run: its last value, and for an evaluation its best one with its step."""

    last: float
    best: float | None
    best_step: int | None


def recalls(values: Mapping[str, float]) -> dict[str, dict[str, dict[int, float]]]:
    """{evaluation: {"i2t" or "t2i": {k: recall in 0..1}}} of the names like "val/i2t/r@5" among `values`."""
    found: dict[str, dict[str, dict[int, float]]] = {}
    for name, value in values.items():
        if m := RECALL.fullmatch(name):
            found.setdefault(m["eval"] or "", {}).setdefault(m["way"], {})[int(m["k"])] = value
    return found


def of_recall(name: str) -> bool:
    """Whether this names a recall, or what belongs to one: its group, its chance."""
    return any(pattern.fullmatch(name) for pattern in (RECALL, GROUPED, CHANCE))


def headed(evaluation: str, values: Mapping[str, float]) -> str:
    """An evaluation with what made items right in it beyond the same sample, e.g. "val (same caption right)"."""
    found = (m for name in values if (m := GROUPED.fullmatch(name)))
    return next((f"{evaluation} (same {m['group']} right)" for m in found if m["eval"] == evaluation.partition("/")[0]), evaluation)


def chance_of(evaluation: str, way: str, values: Mapping[str, float]) -> str:
    """R@K of chance, e.g. " (chance 0.4/1.8/3.6)"; "" where it is not among `values`."""
    found = (m for name in values if (m := CHANCE.fullmatch(name)))
    percent = [f"{100 * values[m[0]]:.1f}" for m in found if (m["eval"], m["way"]) == (evaluation.partition("/")[0], way)]
    return f" (chance {'/'.join(percent)})" if percent else ""


def last_line(values: Mapping[str, float]) -> str:
    """The recalls among `values` both ways, e.g. "val: image-to-text R@1/5/10 52.1/80.0/90.2 %, text-to-image ...".

    Those of groups name the group, and chance. Where there are none, all values as they are.
    """
    texts = []
    for name, ways in recalls(values).items():
        parts = [
            f"{WAYS[way]} R@{'/'.join(map(str, ways[way]))} {'/'.join(f'{100 * v:.1f}' for v in ways[way].values())} %"
            + chance_of(name, way, values)
            for way in WAYS
            if way in ways
        ]
        texts.append((f"{headed(name, values)}: " if name else "") + ", ".join(parts))
    return "; ".join(texts) or "  ".join(f"{name} {number(value)}" for name, value in values.items())


def log_line(step: int, steps: int, row: Mapping[str, float]) -> str:
    """One line of plain text for one row of metrics.jsonl."""
    split = " + ".join(f"{name} {row[f'time/{name}_ms']:.1f}" for name in ("data", "transfer", "compute", "other"))
    names = [k for k in row if "/" not in k and k not in (*KEPT_OUT, "samples_per_s", "samples_per_s_chip", "mfu")]
    own = [f"{k} {number(row[k])}" for k in sorted(names, key=lambda k: k != "loss")]  # the loss first
    mfu = [f"mfu {100 * row['mfu']:.1f} %"] if "mfu" in row else []
    rate = [f"{number(row['samples_per_s'])} samples/s", f"step {row['time/step_ms']:.1f} ms = {split}"]
    return "  ".join([f"step {step:,}/{steps:,} (epoch {row['epoch']:.2f})", *own, *rate, *mfu])


def finals(rows: Sequence[Mapping[str, Any]]) -> dict[str, Final]:
    """Every metric of a run, by name. Best is given for evaluations, whose lines hold no "samples"."""
    out: dict[str, Final] = {}
    for row in rows:
        for name, value in row.items():
            if name in KEPT_OUT:
                continue
            best, at = (None, None) if "samples" in row else (value, row["step"])
            old = out.get(name)
            if old and old.best is not None and best is not None and (old.best <= best if LOWER.search(name) else old.best >= best):
                best, at = old.best, old.best_step
            out[name] = Final(value, best, at)
    return out


def print_summary(rows: Sequence[Mapping[str, Any]], sessions: Sequence[Session], page: Path | None, stall: str = "") -> None:
    """Print the final metrics, where the time went, what a save costs, the page, and last of all the recalls, on standard output."""
    found = finals(rows)
    cells = []
    for name, final in found.items():
        best = ("", "") if final.best is None else (number(final.best), f"{final.best_step:,}")
        if not name.startswith("time/"):
            cells.append((name, number(final.last), *best))
    table("final metrics", ("metric", "last", "best", "at step"), cells)
    tell("\n".join(filter(None, (goodput_line(sessions), stall))))
    if page:
        tell(f"report: {page}")
    evals = {name: final.last for name, final in found.items() if of_recall(name)}
    if evals:
        tell(last_line(evals))


def print_values(values: Mapping[str, float]) -> None:
    """Print the values of an evaluation as a table and, last, its recalls, on standard output."""
    table("evaluation", ("metric", "value"), [(name, number(value)) for name, value in values.items()])
    tell(last_line(values))


def goodput_line(sessions: Sequence[Session]) -> str:
    """Where the time went, largest first: "goodput 91.0 % of 1:02:03 (compute 91.0 %, waiting for data 4.1 %, ...)".

    Of a run that was restarted, also how long it had no process.
    """
    seconds = account(sessions)
    total = max(sum(seconds.values()), 1e-9)
    parts = sorted(((v, k) for k, v in seconds.items() if v / total >= 5e-4), reverse=True)
    inside = ", ".join(f"{KINDS.get(k, k)} {100 * v / total:.1f} %" for v, k in parts)
    apart = f"; {duration(between(sessions))} between its {len(sessions)} processes" if len(sessions) > 1 else ""
    return f"goodput {100 * seconds['compute'] / total:.1f} % of {duration(total)} ({inside}){apart}"


def stall_line(saves: Sequence[float], step: float) -> str:
    """What a checkpoint costs the training, "checkpoint stall 45 ms a save, 0.2 steps (median of 8)"; "" without any. Seconds of each save and of a step."""
    if not saves or not step:
        return ""
    middle = statistics.median(saves)
    return f"checkpoint stall {number(1e3 * middle)} ms a save, {middle / step:.1f} steps (median of {len(saves)})"


def number(value: Any) -> str:
    """A metric for people: whole numbers with separators, others with four digits."""
    if isinstance(value, int):
        return f"{value:,}"
    if isinstance(value, float):
        return f"{value:,.0f}" if 1e3 <= abs(value) < 1e9 else f"{value:.4g}"
    return str(value)
