"""Config files are programs: what they define, and what they raise told with file and line."""

import contextlib
import runpy
import sys
import traceback
from collections.abc import Iterator
from pathlib import Path
from typing import Any

from jaxvl import faults


class ConfigError(ValueError):
    """A config that cannot be run; the message names the key, the value and what would be right."""


def run(path: str) -> dict[str, Any]:
    """What the config file of `path` ("configs/x.py" or "configs/x.py:argument") defines. Raises ConfigError."""
    file = path.partition(":")[0]
    if not Path(file).is_file():
        raise ConfigError(f"--config={path}: no file {file!r}; configs are Python files with get_config()")
    sys.path.insert(0, str(Path(file).resolve().parent))  # a config may import the one it varies
    try:
        with told(path):
            return runpy.run_path(file)
    finally:
        sys.path.pop(0)


@contextlib.contextmanager
def told(path: str) -> Iterator[None]:
    """Raises ConfigError, naming file and line, for whatever the code of the config file of `path` raises.

    What is wrong in another config, which this one varies, has a sentence already.
    """
    try:
        yield
    except ConfigError:
        raise
    except (Exception, SystemExit) as error:
        raise ConfigError(f"--config={path}: {_place(Path(path.partition(':')[0]), error)}: {_reason(error)}") from error


def _place(file: Path, error: BaseException) -> str:
    """ "x.py, line 7": the innermost line that is of the file or of one beside it, which it imports."""
    if isinstance(error, SyntaxError):
        return f"{error.filename or file}" + (f", line {error.lineno}" if error.lineno else "")
    folder = file.resolve().parent
    frames = [f for f in traceback.extract_tb(error.__traceback__) if Path(f.filename).resolve().parent == folder]
    return f"{frames[-1].filename}, line {frames[-1].lineno}" if frames else str(file)


def _reason(error: BaseException) -> str:
    if isinstance(error, SystemExit):
        return "it ends the program (sys.exit); a config file only defines get_config()"
    if isinstance(error, SyntaxError):
        return f"no Python ({error.msg})"
    return faults.sentence(error) or f"{type(error).__name__}: {error}"
