"""What the processes of a run know of each other: which host holds the others up, and which one they wait for.

All steps of a synchronous run take the same time on every process, since each waits for the others in its collectives. What tells a slow
host from the rest is the part of its steps in which its device stood still for its own sake: for data, transfer and host work. That part,
the step and the phase are posted every LOOK seconds through JAX's own service. They are numbers of steps and lengths of time of
one host's monotonic clock: nothing compares the clocks of two hosts.
"""

import json
import socket
import statistics
import threading
import time
from collections.abc import Callable, Mapping
from typing import NamedTuple, Protocol

from jaxvl.progress import duration, say
from jaxvl.report.clock import Activity

LOOK = 5.0  # seconds between two posts
SLOW = (0.2, 0.02)  # a host is slow that holds the others up by this share of the step and by so many seconds
LOOKS = 3  # so many times in a row
OWN = ("data", "transfer", "other")  # phases of a step that a host spends alone


class Board(Protocol):
    """See hosts.Board."""

    def post(self, words: str) -> None: ...
    def read(self) -> dict[int, str]: ...


class Post(NamedTuple):
    """What a process says of itself. beat: how many times it has. lasted: seconds the phase has lasted. own, whole: seconds of its steps so far, by OWN phase, and in all."""

    host: str
    beat: int
    step: int
    phase: str
    lasted: float
    own: dict[str, float]
    whole: float


class Peers:
    """Posts for this process, and on process 0 says which host is slow. Made by the log of a run of several processes.

    activity, step, seconds: of the run's clock: what it is doing, how many steps it has made, seconds by phase so far.
    """

    def __init__(
        self,
        board: Board,
        process: int,
        processes: int,
        activity: Callable[[], Activity],
        step: Callable[[], int],
        seconds: Callable[[], Mapping[str, float]],
        look: float = LOOK,
    ) -> None:
        self._board, self._process, self._processes, self._look = board, process, processes, look
        self._activity, self._step, self._seconds = activity, step, seconds
        self._host, self._beat = socket.gethostname(), 0
        self._slow = Slow()
        self._quit = threading.Event()
        self._thread = threading.Thread(target=self._run, name="peers", daemon=True)
        self._thread.start()

    def close(self) -> None:
        """Stop posting."""
        self._quit.set()
        self._thread.join(timeout=self._look)

    def missing(self) -> str:
        """Which processes the others wait for, in words; takes two looks, which show who has stopped posting. "" where nothing can be told."""
        try:
            before = self._read()
            self._quit.wait(2 * self._look)
            return behind(before, self._read(), self._processes)
        except Exception as error:  # the service itself may be what is gone
            return f"what the other processes do cannot be read: {str(error).splitlines()[0][:200]}"

    def _run(self) -> None:
        while not self._quit.wait(self._look):
            now, seconds = self._activity(), self._seconds()
            own = {name: seconds.get(name, 0.0) for name in OWN}
            self._beat += 1
            mine = Post(
                self._host,
                self._beat,
                self._step(),
                now.phase,
                time.perf_counter() - now.since,
                own,
                sum(own.values()) + seconds.get("compute", 0.0),
            )
            try:
                self._board.post(json.dumps(mine))
                if self._process == 0:
                    for line in self._slow.look(self._read()):
                        say(line)
            except Exception:  # a service that is gone ends this process before long
                continue

    def _read(self) -> dict[int, Post]:
        return {process: Post(*json.loads(words)) for process, words in self._board.read().items()}


class Slow:
    """Finds slow hosts in the posts of one look after the other; says so once, and again when a host has recovered."""

    def __init__(self) -> None:
        self._before: dict[int, Post] = {}
        self._times: dict[int, int] = {}

    def look(self, posts: Mapping[int, Post]) -> list[str]:
        """Lines to print: which host holds the others up by how much a step, and with what."""
        made = {p: post.step - self._before[p].step for p, post in posts.items() if p in self._before}
        if len(made) < len(posts) or min(made.values(), default=0) < 0:  # some had not posted yet, or the run has gone back
            self._before = dict(posts)
            return []
        if len(made) < 2 or min(made.values()) < 1:
            return []
        each = {p: {name: (posts[p].own[name] - self._before[p].own[name]) / n for name in OWN} for p, n in made.items()}
        whole = statistics.median((posts[p].whole - self._before[p].whole) / n for p, n in made.items())
        self._before = dict(posts)
        lines = []
        for p, own in each.items():
            # Against the others without it: of two hosts, the middle between them would be half of what the slow one takes.
            lag = sum(own.values()) - statistics.median(sum(each[q].values()) for q in each if q != p)
            told = self._times.get(p, 0) >= LOOKS
            self._times[p] = self._times.get(p, 0) + 1 if lag > max(SLOW[0] * whole, SLOW[1]) else 0
            if self._times[p] == LOOKS:
                words = {"data": "waiting for data", "transfer": "host to device", "other": "host work"}
                parts = ", ".join(f"{words[k]} {1e3 * v:,.0f} ms" for k, v in sorted(own.items(), key=lambda kv: -kv[1]))
                lines.append(
                    f"slow host: process {p} on {posts[p].host} holds every step up by {1e3 * lag:,.0f} of {1e3 * whole:,.0f} ms ({parts})"
                )
            elif told and self._times[p] == 0:
                lines.append(f"process {p} on {posts[p].host} keeps up again")
        return lines


def behind(before: Mapping[int, Post], now: Mapping[int, Post], processes: int) -> str:
    """Which processes the rest waits for, out of the posts of two looks: those that post no more, else those that never have, else those of the lowest step, else those that do not compute."""
    name = lambda p: f"process {p} on {now[p].host}" if p in now else f"process {p}"
    silent = [p for p in range(processes) if p in now and p in before and before[p].beat == now[p].beat]
    if silent:
        return "the others wait for " + ", ".join(
            f"{name(p)}, which has stopped telling what it does (step {now[p].step:,}, {now[p].phase})" for p in silent
        )
    if absent := [p for p in range(processes) if p not in now]:
        return "the others wait for " + ", ".join(f"{name(p)}, which has not begun its loop" for p in absent)
    last = min(post.step for post in now.values())
    late = [p for p, post in now.items() if post.step == last]
    late = [p for p in late if now[p].phase != "compute"] or late
    if len(late) == len(now):
        return f"all {processes} processes are at step {last:,}, in {', '.join(sorted({post.phase for post in now.values()}))}"
    return "the others wait for " + ", ".join(
        f"{name(p)} (after step {now[p].step:,}, in {now[p].phase} for {duration(now[p].lasted)})" for p in late
    )
