"""Where metrics go: JSON lines always, TensorBoard and Weights & Biases beside them.

`metrics.jsonl` is the record of a run. A resumed run cuts what lies after the step it starts from, so the file reads as
one uninterrupted run however often it was killed. Floats are written so that reading gives back every bit; what JSON
has no number for is written as the strings "nan", "inf" and "-inf".
"""

import importlib.util
import io
import itertools
import json
import math
import os
import re
import shutil
from collections.abc import Callable, Iterator, Mapping
from pathlib import Path
from typing import Any, NamedTuple

from jaxvl.manifest import open_regular
from jaxvl.progress import say

METRICS = "metrics.jsonl"
_NOT_FINITE = ("nan", "inf", "-inf")


class Writer(NamedTuple):
    """One destination: `write(step, values)`, `flush()` to durable storage, `close()`."""

    write: Callable[[int, Mapping[str, Any]], None]
    flush: Callable[[], None]
    close: Callable[[], None]


def encode(row: Mapping[str, Any], indent: int | None = None) -> str:
    """Legal JSON; without `indent` one line of it, without the newline."""
    safe = {k: str(v) if isinstance(v, float) and not math.isfinite(v) else v for k, v in row.items()}
    return json.dumps(safe, allow_nan=False, indent=indent)


def decode(line: str) -> dict[str, Any]:
    """The inverse of `encode`. Raises ValueError where `line` is no JSON object."""
    row = json.loads(line)
    if not isinstance(row, dict):
        raise ValueError(f"{line[:80]!r} is no JSON object")
    return {k: float(v) if isinstance(v, str) and v in _NOT_FINITE else v for k, v in row.items()}


def read_lines(path: str | os.PathLike, *, numbers: bool = False, **fields: type) -> Iterator[tuple[str, dict[str, Any]]]:
    """Every line of a JSON-lines file with its object, which has these fields and with `numbers` nothing else; nothing for a file that does not exist.

    A last line that a kill has torn is left out. Raises ValueError, naming file and line, for damage anywhere else.
    """
    if not Path(path).exists():
        return
    with io.TextIOWrapper(open_regular(Path(path)), encoding="utf-8", errors="replace") as file:
        for number, line in enumerate(file, 1):
            if not line.endswith("\n"):
                return
            try:
                row = decode(line)
                if strange := [name for name, kind in fields.items() if not _is(row.get(name), kind)]:
                    raise ValueError(f"its {strange[0]!r} is {row.get(strange[0])!r}; it must be {fields[strange[0]].__name__}")
                if strange := [name for name, value in row.items() if numbers and not (_is(value, int) or _is(value, float))]:
                    raise ValueError(f"its {strange[0]!r} is {row[strange[0]]!r}; it must be a number")
            except (ValueError, RecursionError) as error:
                raise ValueError(f"{path}, line {number}: {error}; repair or remove this line") from None
            yield line, row


def read_metrics(workdir: str | os.PathLike) -> list[dict[str, Any]]:
    """The rows of a run's metrics.jsonl, in order."""
    return [row for _, row in read_lines(Path(workdir) / METRICS, numbers=True, step=int)]


def mend(path: Path, **fields: type) -> None:
    """Drop the lines of a JSON-lines file that are no object with these fields; the file as it was is kept beside it, and said.

    A line of a log is not worth a run: training goes on with those that can be read. A last line that a kill has torn is no damage.
    """
    if not path.is_file():
        return
    lines = path.read_bytes().splitlines(keepends=True)
    whole = lines[:-1] if lines and not lines[-1].endswith(b"\n") else lines
    good = [line for line in whole if _has(line, fields)]
    if len(good) < len(whole):
        kept = aside(path)
        write_atomic(path, b"".join(good).decode())
        say(f"{path}: {len(whole) - len(good)} of {len(whole)} lines are damaged and left out; the file as it was is {kept}")


def read_whole(path: Path, parse: Callable[[Any], Any], empty: Any) -> Any:
    """`parse` of what a JSON file holds, `empty` where there is none; a damaged one is set aside, and said.

    For files that only a report is made of, without which a run can go on.
    """
    if not path.is_file():
        return empty
    try:
        return parse(json.loads(path.read_bytes()))
    except (ValueError, TypeError, KeyError, AttributeError, RecursionError) as error:
        say(f"{path} is damaged ({str(error)[:80]}) and begun anew; the file as it was is {aside(path)}")
        path.unlink()
        return empty


def aside(path: Path) -> Path:
    """A copy of a damaged file beside it, under a name that no other has: nothing is lost."""
    numbers = (path.with_name(f"{path.name}.damaged{i or ''}") for i in itertools.count())
    copy = next(free for free in numbers if not free.exists())
    shutil.copyfile(path, copy)
    return copy


def _has(line: bytes, fields: Mapping[str, type]) -> bool:
    try:
        row = decode(line.decode())
    except (ValueError, RecursionError):
        return False
    return all(_is(row.get(name), kind) for name, kind in fields.items())


def _is(value: Any, kind: type) -> bool:
    return isinstance(value, kind) and not isinstance(value, bool)


def cut(path: Path, step: int) -> None:
    """Drop the lines of a JSON-lines file that are torn or whose "step" is above `step`; atomic."""
    if path.exists():
        write_atomic(path, "".join(line for line, row in read_lines(path) if row["step"] <= step))


def write_atomic(path: Path, text: str) -> None:
    """Replace a file: whoever reads it, now or after a crash, sees the old text or the new."""
    part = path.with_name(f"{path.name}.{os.getpid()}.part")  # two processes may write the same file, such as the table of a sweep
    with open(part, "w", encoding="utf-8") as file:
        file.write(text)
        file.flush()
        os.fsync(file.fileno())
    os.replace(part, path)


def jsonl_writer(path: Path) -> Writer:
    """Appends one JSON object a line; a line is with the operating system when `write` returns. OSErrors name the file."""
    file = open(path, "a", encoding="utf-8")  # noqa: SIM115

    def write(step: int, values: Mapping[str, Any]) -> None:
        try:
            file.write(encode({"step": step, **values}) + "\n")
            file.flush()
        except OSError as error:
            raise OSError(error.errno, error.strerror, str(path)) from error

    def flush() -> None:
        file.flush()
        os.fsync(file.fileno())

    return Writer(write, flush, file.close)


def tensorboard_writer(folder: Path, step: int) -> Writer:
    """Scalars for TensorBoard; what an earlier run logged after `step` is hidden."""
    from tensorboardX import SummaryWriter

    # TensorBoard names its files by the second; the step keeps a quick resume from writing over the file before it.
    board = SummaryWriter(str(folder), purge_step=step + 1, max_queue=1000, flush_secs=10, filename_suffix=f".{step}")

    def write(step: int, values: Mapping[str, Any]) -> None:
        for name, value in values.items():
            board.add_scalar(re.sub(r"[^-/\w.]", "_at_", name), value, step)  # TensorBoard has no "@" in names

    return Writer(write, board.flush, board.close)


def need_wandb(project: str) -> None:
    """Raises ValueError where the package is not installed."""
    if importlib.util.find_spec("wandb") is None:
        raise ValueError(f"config.log.wandb is {project!r}, but wandb is not installed: pip install wandb, or set config.log.wandb=''")


def wandb_writer(project: str, folder: Path, config: str) -> Writer:
    """Scalars for Weights & Biases; a resumed run continues the run whose id is kept in `folder`.

    Lines that a resumed run computes once more carry the values already there, so it does no harm that W&B drops them.
    """
    import wandb

    kept = folder / "wandb_id"
    run = wandb.init(
        project=project,
        dir=str(folder),
        resume="allow",
        id=kept.read_text() if kept.exists() else None,
        config={"config": config},
    )
    write_atomic(kept, run.id)
    return Writer(lambda step, values: run.log(dict(values), step=step), lambda: None, run.finish)
