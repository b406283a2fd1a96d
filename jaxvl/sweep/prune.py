"""Which trials are stopped before their end: those that, at one step, are not among the best share of all that got there.

With a share of 1/2 this is the median rule (Golovin et al., Google Vizier, KDD 2017, section 3.2.2, with the best value so
far in place of running means); with 1/3 or 1/4 it is successive halving without waiting (Li et al., A System for Massively
Parallel Hyperparameter Tuning, MLSys 2020, algorithm 2), every evaluation a rung. A trial is judged by what it has reached
by that step, the others by what they had reached by the same step, so the order in which trials run matters little.
"""

import math
from collections.abc import Mapping

from jaxvl.sweep.options import SweepOptions


def falls_behind(options: SweepOptions, curves: Mapping[str, Mapping[int, float]], name: str) -> str:
    """Why trial `name` should stop at its last evaluation, or "". curves: trial -> step -> value of the metric."""
    own = curves.get(name)
    if options.keep >= 1 or not own or max(own) < options.keep_from:
        return ""
    step = max(own)
    reached = {other: best(options, curve, step) for other, curve in curves.items() if step in curve}
    if len(reached) < max(options.keep_least, 2):
        return ""
    better = sum(value > reached[name] for other, value in reached.items() if other != name)
    going_on = math.ceil(options.keep * len(reached))
    if better < going_on:
        return ""
    return f"step {step:,}: {better} of {len(reached) - 1} others were better at that step; the best {going_on} go on"


def best(options: SweepOptions, curve: Mapping[int, float], step: int) -> float:
    """The best value up to `step`, larger is better; -inf where none is a number."""
    sign = 1.0 if options.mode == "max" else -1.0
    return max((sign * v for s, v in curve.items() if s <= step and math.isfinite(v)), default=-math.inf)
