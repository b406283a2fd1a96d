"""Goodput: which share of all the hours a run has held its devices moved the training forward.

A run may be killed and resumed many times. Each process keeps its account in `sessions.json`; steps that a later
process had to compute once more, since it resumed from an older checkpoint, turn from useful time into lost time.
"""

import json
from collections import defaultdict
from collections.abc import Sequence
from pathlib import Path
from typing import NamedTuple

from jaxvl.report.clock import STEP
from jaxvl.report.metrics import read_whole, write_atomic

# Order and wording of the account; "compute" is the useful part.
KINDS = {
    "compute": "compute",
    "data": "waiting for data",
    "transfer": "host to device",
    "other": "host work",
    "eval": "evaluation",
    "checkpoint": "checkpoint stalls",
    "rollback": "going back",
    "compile": "compilation",
    "log": "writing the log",
    "restart": "start and restart",
    "lost": "work lost in a kill",
}


class Session(NamedTuple):
    """One process of a run: the steps (first, last] it made, of which (first, kept] count, and its seconds by kind."""

    began: float  # Unix time
    first: int
    last: int
    kept: int
    seconds: dict[str, float]


def read_sessions(folder: Path) -> list[Session]:
    """The sessions noted in `folder`, oldest first."""
    return read_whole(folder / "sessions.json", lambda entries: [_session(**entry) for entry in entries], [])


def _session(began: float, first: int, last: int, kept: int, seconds: dict[str, float]) -> Session:
    """Raises TypeError where an entry is none of a session."""
    return Session(float(began), int(first), int(last), int(kept), {str(k): float(v) for k, v in seconds.items()})


def save_sessions(folder: Path, sessions: Sequence[Session]) -> None:
    """Write the sessions to `folder`; atomic."""
    write_atomic(folder / "sessions.json", json.dumps([s._asdict() for s in sessions], indent=1))


def resume(sessions: Sequence[Session], step: int) -> list[Session]:
    """The earlier sessions of a run that goes on from `step`: what they made after it no longer counts."""
    return [s._replace(kept=min(s.kept, max(s.first, step))) for s in sessions]


def account(sessions: Sequence[Session]) -> dict[str, float]:
    """Seconds by kind over all sessions, in the order of KINDS; a pause of another name keeps its name."""
    total: dict[str, float] = defaultdict(float, dict.fromkeys(KINDS, 0.0))
    for s in sessions:
        share = (s.kept - s.first) / (s.last - s.first) if s.last > s.first else 1.0
        for kind, seconds in s.seconds.items():
            useful = share if kind in STEP else 1.0
            total[kind] += seconds * useful
            total["lost"] += seconds * (1.0 - useful)
    return dict(total)


def between(sessions: Sequence[Session]) -> float:
    """Seconds in which a run that was to go on had no process: from the last note of each to the start of the next."""
    ends = [s.began + sum(s.seconds.values()) for s in sessions]
    return sum(max(0.0, after.began - end) for end, after in zip(ends, sessions[1:], strict=False))
