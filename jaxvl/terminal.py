"""All that jaxvl prints; credentials in URLs are left out of it. Names of files, keys and captions come from strangers, so nothing in them may command a terminal or turn text around.

Whatever a terminal obeys is printed as JSON would escape it, "\\u001b", so that printed JSON stays the same JSON.
"""

import contextlib
import logging
import re
import sys
import traceback
import warnings
from collections.abc import Collection, Sequence
from typing import Any

from jaxvl.secrets import public

# Controls (C0 without tab and line feed, DEL, C1), marks and overrides of direction, separators of lines and paragraphs, halves of surrogate
# pairs (bytes of a file name that are no text), and the tags, which are never drawn.
OBEYED = re.compile("[\0-\x08\x0b-\x1f\x7f-\x9f\u061c\u200e\u200f\u2028-\u202e\u2066-\u206f\ud800-\udfff\U000e0000-\U000e007f]")
PLAIN_WIDTH = 200  # columns of a table that goes to no terminal, which has no width to fold cells to


def visible(text: str, *, line: bool = False) -> str:
    """`text` with what a terminal obeys escaped; with `line` its line feeds and tabs too."""
    text = OBEYED.sub(lambda found: _escaped(found[0]), public(text))
    return text.replace("\n", "\\n").replace("\t", "\\t") if line else text


def tell(text: str, *, error: bool = False) -> None:
    """Print a line: a result on standard output, or with `error` what is said beside it, on standard error."""
    stream = sys.stderr if error else sys.stdout
    encoding = getattr(stream, "encoding", None) or "utf-8"
    print(visible(text).encode(encoding, "backslashreplace").decode(encoding), file=stream, flush=True)


def table(
    title: str,
    head: Sequence[str],
    rows: Sequence[Sequence[str]],
    *,
    left: Collection[str] = (),
    box: str = "HEAVY_HEAD",
    total: bool = False,
) -> None:
    """Print a table on standard output. left: columns that are not numbers, by default the first. total: the last row sums the others up."""
    import rich.box
    from rich.table import Table
    from rich.text import Text

    cell = lambda text: Text(visible(text, line=True))
    made = Table(title=cell(title), title_justify="left", title_style="bold", box=getattr(rich.box, box))
    for column in head:
        made.add_column(cell(column), justify="left" if column in (left or head[:1]) else "right", overflow="fold")
    for number, row in enumerate(rows, 1):
        made.add_row(*map(cell, row), end_section=total and number == len(rows) - 1)
    screen().print(made)


def screen(*, error: bool = False) -> Any:
    """The rich console on standard output or standard error; what is printed on it goes through `visible` first."""
    from rich.console import Console

    width = None if error or sys.stdout.isatty() else PLAIN_WIDTH
    return Console(stderr=error, highlight=False, markup=False, emoji=False, width=width)


def guard() -> None:
    """From now on what Python's warnings and logging print has gone through `visible`, whichever handlers other libraries set."""
    warnings.formatwarning = _warning
    logging.setLogRecordFactory(_record)


def _record(*args: Any, **fields: Any) -> logging.LogRecord:
    record = logging.LogRecord(*args, **fields)
    with contextlib.suppress(TypeError, ValueError, KeyError):  # of a wrong format, which its handler tells
        record.msg, record.args = visible(record.getMessage()), None
    if record.exc_info and record.exc_info[0]:
        record.exc_text = visible("".join(traceback.format_exception(*record.exc_info)).rstrip("\n"))  # which handlers print as it is
    return record


def _warning(message: Warning | str, category: type[Warning], filename: str, lineno: int, line: str | None = None) -> str:
    return visible(_formatwarning(message, category, filename, lineno, line))


_formatwarning = warnings.formatwarning


def _escaped(character: str) -> str:
    units = character.encode("utf-16-be", "surrogatepass")
    return "".join(f"\\u{units[i]:02x}{units[i + 1]:02x}" for i in range(0, len(units), 2))
