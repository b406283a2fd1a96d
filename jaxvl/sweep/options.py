"""What a sweep is: the keys that `sweep()` in a config file may return, checked strictly.

    def sweep():
        return dict(
            metric="val/i2t/r@1",
            rows={"base": {}, "wide": {"method.width": 192}},
            grid={"optim.learning_rate": (1e-3, 2e-3)},
            seeds=(0, 1, 2),
        )

Rows, the points of the grid, the points drawn from the space, and the seeds multiply.
"""

import difflib
import math
from collections.abc import Mapping
from typing import Any, NamedTuple


class Uniform(NamedTuple):
    """A float between low and high; `log`: uniform in its logarithm."""

    low: float
    high: float
    log: bool = False


class Integer(NamedTuple):
    """A whole number from low to high, both included; `log`: uniform in its logarithm."""

    low: int
    high: int
    log: bool = False


class Choice(NamedTuple):
    """One of the options, all equally likely."""

    options: tuple[Any, ...]


class SweepOptions(NamedTuple):
    """The keys of the dict that `sweep()` returns.

    metric: of the runs' evaluations, "val/i2t/r@1". mode: max or min. pick: a run counts with its "last" value or its "best".
    also: further metrics for the tables. config: the recipe, where it is another file; relative to the sweep's file.

    rows: name -> overrides, in the order of the table; the key "config" gives a row a recipe of its own.
    grid: override key -> values. space: override key -> Uniform, Integer or Choice, of which `trials` points are drawn by
    `sampler` ("random", or "tpe" with Optuna) from `sampler_seed`. seeds: values of config.seed; a table row spans them.

    keep: share of the trials that go on. A trial that is not among the best `keep` of all that have reached its step is
    stopped there (1.0: none is), from step `keep_from` on and not before `keep_least` trials have reached it.
    """

    metric: str
    mode: str = "max"
    pick: str = "last"
    also: tuple[str, ...] = ()
    config: str = ""
    rows: Mapping[str, Mapping[str, Any]] = {}
    grid: Mapping[str, tuple[Any, ...]] = {}
    space: Mapping[str, Uniform | Integer | Choice] = {}
    trials: int = 0
    sampler: str = "random"
    sampler_seed: int = 0
    seeds: tuple[int, ...] = ()
    keep: float = 1.0
    keep_from: int = 0
    keep_least: int = 4


class SweepError(ValueError):
    """A sweep that cannot be run; the message names the key, the value and what would be right."""


def read(plain: Any) -> SweepOptions:
    """The options of what `sweep()` returned. Raises SweepError naming the first key that is unknown or cannot be meant."""
    if not isinstance(plain, Mapping):
        raise SweepError(f"sweep() returned {plain!r}; it must return a dict with the keys {', '.join(SweepOptions._fields)}")
    for key in plain:
        if key not in SweepOptions._fields:
            near = difflib.get_close_matches(str(key), SweepOptions._fields, 1)
            raise SweepError(
                f"sweep(): {key} is a key that nothing reads{f'; did you mean {near[0]!r}?' if near else ''}; legal keys: {', '.join(SweepOptions._fields)}"
            )
    if not plain.get("metric"):
        raise SweepError("sweep(): metric is missing; it must name a number of the evaluations, for one 'val/i2t/r@1'")
    return check(SweepOptions(**plain))


def check(options: SweepOptions) -> SweepOptions:
    """`options` with lists as tuples. Raises SweepError naming the key, its value and what would be right."""
    o = options
    for key in ("also", "seeds"):
        if not isinstance(getattr(o, key), (tuple, list)):
            raise SweepError(f"sweep(): {key} is {getattr(o, key)!r}; it must be a tuple")
    for key in ("rows", "grid", "space"):
        if not isinstance(getattr(o, key), Mapping):
            raise SweepError(f"sweep(): {key} is {getattr(o, key)!r}; it must be a dict")
    o = o._replace(
        also=tuple(o.also), seeds=tuple(o.seeds), grid={k: tuple(v) if isinstance(v, (tuple, list)) else v for k, v in o.grid.items()}
    )
    for where, names in (("metric", (o.metric,)), ("also", o.also), ("rows", o.rows), ("grid", o.grid), ("space", o.space)):
        # A sweep of one row may leave its name out.
        if odd := [name for name in names if not isinstance(name, str) or not (name or where == "rows")]:
            raise SweepError(f"sweep(): {where} has the name {odd[0]!r}; it must be a text")
    for name, row in o.rows.items():
        if not isinstance(row, Mapping) or not all(isinstance(key, str) for key in row):
            raise SweepError(f"sweep(): rows[{name!r}] is {row!r}; it must be a dict of overrides, {{'method.width': 192}}")
    for key, values in o.grid.items():
        if not isinstance(values, tuple) or not values:
            raise SweepError(f"sweep(): grid[{key!r}] is {values!r}; it must be a tuple of values")
    for key, distribution in o.space.items():
        _check_distribution(key, distribution)
    whole = lambda n: isinstance(n, int) and not isinstance(n, bool)
    rules = (
        ("mode", o.mode in ("max", "min"), "'max' or 'min'"),
        ("pick", o.pick in ("last", "best"), "'last' or 'best'"),
        ("sampler", o.sampler in ("random", "tpe"), "'random' or 'tpe'"),
        ("trials", whole(o.trials) and (o.trials >= 1) == bool(o.space), "at least 1 with a space, and 0 without one"),
        ("sampler_seed", whole(o.sampler_seed), "a whole number"),
        ("seeds", all(map(whole, o.seeds)) and len(set(o.seeds)) == len(o.seeds), "different whole numbers"),
        ("config", isinstance(o.config, str), "the path of a config file"),
        ("keep", isinstance(o.keep, (int, float)) and 0 < o.keep <= 1, "above 0 and at most 1"),
        ("keep_from", whole(o.keep_from) and o.keep_from >= 0, "a step"),
        ("keep_least", whole(o.keep_least) and o.keep_least >= 2, "at least 2 trials"),
        ("sampler", o.sampler != "tpe" or bool(o.space), "'random' without a space: there is nothing for 'tpe' to choose"),
        ("sampler", o.sampler != "tpe" or not (o.rows or o.grid or o.seeds), "'random' with rows, a grid or seeds: TPE draws from the space alone; put their values there as a Choice"),
    )  # fmt: skip
    for key, good, right in rules:
        if not good:
            raise SweepError(f"sweep(): {key} is {getattr(o, key)!r}; it must be {right}")
    if not (o.rows or o.grid or o.space or o.seeds):
        raise SweepError("sweep(): there is nothing to vary; give rows, grid, space or seeds")
    sources = [*o.grid, *o.space, *(["seed"] if o.seeds else [])]
    for key in {k for row in o.rows.values() for k in row} | set(sources):
        if sources.count(key) + any(key in row for row in o.rows.values()) > 1:
            raise SweepError(f"sweep(): {key} is set in more than one of rows, grid, space and seeds")
    return o


def _check_distribution(key: str, d: Any) -> None:
    where = f"sweep(): space[{key!r}] is {d!r}"
    if isinstance(d, Choice):
        if not isinstance(d.options, (tuple, list)) or not d.options:
            raise SweepError(f"{where}; its options must be a tuple with something in it")
    elif isinstance(d, (Uniform, Integer)):
        numbers = all(isinstance(x, (int, float)) and math.isfinite(x) for x in (d.low, d.high))
        if not (numbers and d.low < d.high):
            raise SweepError(f"{where}; both must be numbers, and low must be below high")
        if d.log and d.low <= 0:
            raise SweepError(f"{where}; with log, low must be above 0")
        if isinstance(d, Integer) and not (isinstance(d.low, int) and isinstance(d.high, int)):
            raise SweepError(f"{where}; low and high must be whole numbers")
    else:
        raise SweepError(f"{where}; it must be a Uniform, an Integer or a Choice of jaxvl.sweep")
