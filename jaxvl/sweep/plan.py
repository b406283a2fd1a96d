"""From a config file to the trials of its sweep: every name, every complete config, all wrong ones told before any runs."""

import inspect
import itertools
import math
import random
import re
import zlib
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any, NamedTuple

from ml_collections import ConfigDict

from jaxvl import config as configs, config_file
from jaxvl.sweep.options import Choice, Integer, SweepError, SweepOptions, Uniform, read
from jaxvl.tiny import shrink

LONGEST = 120  # characters of a folder's name


class Trial(NamedTuple):
    """One run of a sweep. group: the row of the table that its seeds share. overrides: what sets it apart. config: complete."""

    name: str
    group: str
    seed: int | None
    overrides: dict[str, Any]
    config: ConfigDict


class Base(NamedTuple):
    """What all trials of a sweep start from. path: of the sweep's file. overrides: of the command line, for every trial."""

    path: str
    options: SweepOptions
    overrides: tuple[str, ...]
    tiny: bool


def load(path: str, overrides: Iterable[str] = (), *, tiny: bool = False) -> Base:
    """The sweep of a config file ("configs/x.py" or "configs/x.py:argument"). Raises ConfigError or SweepError."""
    namespace = config_file.run(path)
    if "sweep" not in namespace:
        raise SweepError(f"--config={path}: {path.partition(':')[0]!r} defines no sweep()")
    make, arg = namespace["sweep"], path.partition(":")[2]
    with config_file.told(path):
        plain = make(arg) if arg and inspect.signature(make).parameters else make()
    return Base(path, read(plain), tuple(overrides), tiny)


def trials(base: Base) -> list[Trial]:
    """The trials in order: rows, then grid, then random points, then seeds. Raises ValueError, naming the trial, for one that cannot be run."""
    o = base.options
    found = []
    points = [(f"r{i:03}", draw(o, i)) for i in range(o.trials)] or [("", {})]
    for (row, own), cell, (point, drawn), seed in itertools.product(
        o.rows.items() or [("", {})], _cells(o.grid), points, o.seeds or (None,)
    ):
        group = ",".join(filter(None, (row, _label(cell), point)))
        name = "-".join(filter(None, (group, "" if seed is None else f"seed{seed}")))
        found.append(make(base, folder_name(name), group, seed, {**own, **cell, **drawn}))
    names = [t.name for t in found]
    if twice := sorted({n for n in names if names.count(n) > 1}):
        raise SweepError(f"sweep(): two trials would share the folder {twice[0]!r}; name the rows apart")
    return found


def make(base: Base, name: str, group: str, seed: int | None, overrides: Mapping[str, Any]) -> Trial:
    """A trial with its complete config. Raises ValueError, naming the trial, where that cannot be run or does not evaluate the metric."""
    changes = {k: v for k, v in overrides.items() if k != "config"} | ({} if seed is None else {"seed": seed})
    for item in base.overrides:
        if (key := item.partition("=")[0]) in changes:
            raise SweepError(f"--config.{key}: the sweep itself sets {key}, in trial {name!r} to {changes[key]!r}")
    source = overrides.get("config") or base.options.config
    path = str(Path(base.path.partition(":")[0]).parent / source) if source else base.path
    try:
        plain = configs.load(path, base.overrides).to_dict()
        for key, value in changes.items():
            _set(plain, key, value)
        config = configs.complete(ConfigDict(plain, convert_dict=True))
        recipe = configs.read(config)
    except ValueError as error:
        raise SweepError(f"trial {name!r}: {error}") from None
    for metric in (base.options.metric, *base.options.also):
        if metric.partition("/")[0] not in recipe.evals:
            known = ", ".join(recipe.evals) or "none: config.evals is empty"
            raise SweepError(
                f"trial {name!r} has no evaluation {metric.partition('/')[0]!r} to give the metric {metric!r}; its evaluations: {known}"
            )
    return Trial(name, group, seed, dict(overrides), shrink(config) if base.tiny else config)


def lengths(trials: Sequence[Trial]) -> Callable[[str], int]:
    """Steps of each trial by name; 1 for all where one counts in epochs, whose steps are known only when its data is open."""
    steps = {trial.name: trial.config.train.steps for trial in trials}
    return lambda name: steps[name] if all(steps.values()) else 1


def draw(options: SweepOptions, index: int) -> dict[str, Any]:
    """Random point `index` of the space; it depends on neither the number of points nor the other keys."""
    return {key: _sample(d, random.Random(f"{options.sampler_seed}/{index}/{key}")) for key, d in options.space.items()}


def folder_name(text: str) -> str:
    """`text` as the name of a folder: letters, digits and ,.=+-_ only, cut where it is too long and then told apart by a checksum."""
    clean = re.sub(r"[^\w,.=+-]+", "_", text, flags=re.ASCII).strip("_.-") or "trial"
    return clean if len(clean) <= LONGEST else f"{clean[: LONGEST - 9]}-{zlib.crc32(text.encode()):08x}"


def short_keys(keys: Iterable[str]) -> dict[str, str]:
    """Each override key with the shortest end that tells it from the others: optim.learning_rate -> learning_rate."""
    keys = list(keys)

    def shortest(key: str) -> str:
        parts = key.split(".")
        ends = (".".join(parts[-n:]) for n in range(1, len(parts)))
        return next((e for e in ends if sum(other == e or other.endswith(f".{e}") for other in keys) == 1), key)

    return {key: shortest(key) for key in keys}


def _cells(grid: Mapping[str, tuple[Any, ...]]) -> Iterator[dict[str, Any]]:
    for values in itertools.product(*grid.values()):
        yield dict(zip(grid, values, strict=True))


def _label(cell: Mapping[str, Any]) -> str:
    short = short_keys(cell)
    return ",".join(f"{short[k]}={v:g}" if isinstance(v, float) else f"{short[k]}={v}" for k, v in cell.items())


def _sample(d: Uniform | Integer | Choice, rng: random.Random) -> Any:
    if isinstance(d, Choice):
        return d.options[rng.randrange(len(d.options))]
    if isinstance(d, Integer):
        return (
            min(d.high, max(d.low, int(math.exp(rng.uniform(math.log(d.low), math.log(d.high + 1))))))
            if d.log
            else rng.randint(d.low, d.high)
        )
    x = math.exp(rng.uniform(math.log(d.low), math.log(d.high))) if d.log else rng.uniform(d.low, d.high)
    return min(d.high, max(d.low, float(f"{x:.4g}")))  # four digits, so that the table shows the very number that ran


def _set(plain: dict[str, Any], key: str, value: Any) -> None:
    *path, last = key.split(".")
    node: Any = plain
    for depth, part in enumerate(path):
        node = node.setdefault(part, {})
        if not isinstance(node, dict):
            raise SweepError(f"override {key}: config.{'.'.join(path[: depth + 1])} is {node!r}, not a section")
    node[last] = value
