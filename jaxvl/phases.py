"""What of a recipe waits for a step of the run: refused where that step never comes, as nobody would notice by the numbers."""

from typing import Any

from jaxvl.methods.method import Method
from jaxvl.optim import OptimOptions


def check(method: Method, optim: OptimOptions, steps: int) -> None:
    """Raises ValueError naming the first key whose step a run of `steps` steps does not reach."""
    waits = [(f"method.{key}", step) for key, step in method.waits]
    waits += [(f"optim.hold of {pattern!r}", step) for pattern, step in optim.hold]
    waits += [("optim.step_every", optim.step_every)] if optim.schedule == "step" else []
    for key, step in waits:
        if step >= steps > 0:
            raise ValueError(
                f"config.{key} is step {step:,}, and the run has {steps:,} steps: what waits for it would never happen; "
                f"it must be at most {steps - 1:,}, or config.train longer"
            )


def check_resumed(method: Method, memory: Any, step: int, steps: int) -> None:
    """Raises ValueError where a run of now `steps` steps cannot go on from `step` as its config says."""
    if step > steps:
        raise ValueError(f"config.train comes to {steps:,} steps, and the run is at step {step:,} already; it must be at least that")
    if method.resumed is not None:
        method.resumed(memory, step)
