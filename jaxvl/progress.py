"""Progress on standard error: bars with an ETA on a terminal, a plain line now and then elsewhere.

Everything that can take over five seconds goes through `progress`; results go to standard output, so that a command's
output can be piped while its progress stays on the screen. Bars nest: those open at one time share one live display.
"""

import sys
import threading
import time
from collections.abc import Iterable, Iterator, Sized
from typing import Any

from jaxvl.terminal import screen, tell, visible

PATIENCE = 5.0  # seconds of work before a plain line is printed
EVERY = 15.0  # seconds between plain lines of one bar

_lock = threading.RLock()
_live: Any = None  # the rich display shared by the open bars
_open = 0
_silent = False


class Bar:
    """One piece of work. Iterate over it, or use it in a `with` block and call `advance`."""

    def __init__(self, items: Iterable[Any], text: str, total: int | None, unit: str, done: int, plain: bool):
        self._items, self._text, self._total, self._unit = items, visible(text, line=True), total, visible(unit, line=True)
        self._plain = plain
        self.done = done
        self._begin = self._printed = 0.0
        self._origin: tuple[float, int] | None = None  # time and count at the first advance, so that start-up is no part of the rate
        self._task: Any = None

    def __enter__(self) -> "Bar":
        self._begin = self._printed = time.monotonic()
        if not _silent and sys.stderr.isatty():
            with _lock:
                self._task = _display().add_task(self._text, total=self._total, completed=self.done, unit=self._unit, note="", eta="")
        return self

    def __exit__(self, *error: object) -> None:
        if self._task is not None:
            with _lock:
                _release(self._task)
            self._task = None
        elif self._printed > self._begin:
            say(f"{self._text}: {self._count()} in {duration(time.monotonic() - self._begin)}")

    def __iter__(self) -> Iterator[Any]:
        with self:
            for item in self._items:
                yield item
                self.advance()

    def advance(self, n: int = 1, note: str = "") -> None:
        """Count `n` more done; `note` is shown beside the count."""
        now = time.monotonic()
        self.done += n
        if n and self._origin is None:
            self._origin = (now, self.done)
        if self._task is not None:
            _live.update(self._task, completed=self.done, note=visible(note, line=True), eta=self._eta_text())
        elif self._plain and now - self._begin > PATIENCE and (self._printed == self._begin or now - self._printed > EVERY):
            self._printed = now
            say("  ".join(filter(None, (f"{self._text}: {self._count()}", note, self._eta_text()))))

    def eta(self) -> float | None:
        """Seconds left at the mean rate since the first advance, or None while that is unknown."""
        if self._total is None or self._origin is None or self.done <= self._origin[1]:
            return None
        now, then = time.monotonic(), self._origin
        return (now - then[0]) / (self.done - then[1]) * max(0, self._total - self.done)

    def _eta_text(self) -> str:
        eta = self.eta()
        return "" if eta is None else f"ETA {duration(eta)}"

    def _count(self) -> str:
        of = f"/{self._total:,}" if self._total is not None else ""
        return f"{self.done:,}{of} {self._unit}".rstrip()


def progress(
    items: Iterable[Any] = (),
    text: str = "",
    *,
    total: int | None = None,
    unit: str = "",
    done: int = 0,
    plain: bool = True,
) -> Bar:
    """A bar over `items`, or for a `with` block.

    total: how many there are; by default len(items) where items has a length.
    done: how many are done already (a resumed run). plain=False prints nothing where there is no terminal.

        for shard in progress(shards, "index", unit="shards"): ...
        with progress(total=1000, text="tokenizer", unit="captions") as bar: bar.advance(64)
    """
    if total is None and isinstance(items, Sized):
        total = len(items) or None
    return Bar(items, text, total, unit, done, plain)


def say(text: str) -> None:
    """Print a line on standard error, above the open bars. Silent on every process but the first."""
    if _silent:
        return
    with _lock:
        if _live is not None:
            _live.console.print(visible(text), soft_wrap=True)
        else:
            tell(text, error=True)


def silence(silent: bool = True) -> None:
    """Turn bars and `say` off in this process: one process of a run speaks for all."""
    global _silent
    _silent = silent


def duration(seconds: float) -> str:
    """`seconds` as m:ss, h:mm:ss or d days h:mm:ss."""
    minutes, s = divmod(round(seconds), 60)
    hours, m = divmod(minutes, 60)
    days, h = divmod(hours, 24)
    clock = f"{h}:{m:02}:{s:02}" if hours else f"{m}:{s:02}"
    return f"{days} d {clock}" if days else clock


def _display() -> Any:
    """The live display, started with the first bar."""
    global _live, _open
    if _live is None:
        from rich.progress import BarColumn, Progress, ProgressColumn, TextColumn, TimeElapsedColumn
        from rich.text import Text

        class Count(ProgressColumn):
            def render(self, task: Any) -> Text:
                if task.total is None and not task.completed:
                    return Text("")
                of = f"/{int(task.total):,}" if task.total is not None else ""
                return Text(f"{int(task.completed):,}{of} {task.fields['unit']}".rstrip())

        columns = (
            TextColumn("{task.description}", markup=False),
            BarColumn(bar_width=24),
            Count(),
            TextColumn("{task.fields[note]}", markup=False),
            TimeElapsedColumn(),
            TextColumn("{task.fields[eta]}", markup=False, style="cyan"),
        )
        # What is printed to a redirected standard output must not be drawn on the screen instead.
        _live = Progress(*columns, console=screen(error=True), transient=True, redirect_stdout=sys.stdout.isatty())
        _live.start()
    _open += 1
    return _live


def _release(task: Any) -> None:
    global _live, _open
    _live.remove_task(task)
    _open -= 1
    if _open == 0:
        _live.stop()
        _live = None
