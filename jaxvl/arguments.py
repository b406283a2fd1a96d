"""What the arguments of the command line may be; a wrong one is told as argparse tells them, with its name."""

import argparse
import math
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import NoReturn

from jaxvl.terminal import visible


class Parser(argparse.ArgumentParser):
    def error(self, message: str) -> NoReturn:
        super().error(visible(message))


def least(kind: type, lowest: float) -> Callable[[str], float]:
    """The type of an argument that is a finite number from `lowest` on."""

    def read(text: str) -> float:
        try:
            value = kind(text)
        except ValueError:
            value = math.nan
        if not lowest <= value < math.inf:
            raise argparse.ArgumentTypeError(f"{text!r} is no {'whole ' * (kind is int)}number from {lowest:g} on")
        return value

    return read


def place(text: str) -> Path:
    """The type of an argument that is a path: "", which an unset variable of a shell makes of it, would be the current folder."""
    if not text:
        raise argparse.ArgumentTypeError("it is empty; is a variable of the shell not set?")
    return Path(text)


def alone(flag: str, others: Mapping[str, object], overrides: Sequence[str]) -> None:
    """Raises ValueError for what was given beside a flag that does not read it."""
    if strange := [name for name, value in others.items() if value] + [f"--config.{item}" for item in overrides]:
        raise ValueError(f"{flag} does not read {strange[0]}; leave it out")
