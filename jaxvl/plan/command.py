"""The verb `jaxvl plan`."""

import json as json_
import os
from collections.abc import Sequence
from pathlib import Path

from jaxvl import terminal


def main(
    config: str | None, overrides: Sequence[str], topology: str | None, *, compiles: int, limit: float, estimate: bool, json: bool
) -> int:
    """Print the plan of a config for a topology. Raises ValueError for what cannot be planned, naming it."""
    os.environ["JAX_PLATFORMS"] = "cpu"  # planning uses no accelerator of this machine; must precede any import of jax
    from jaxvl import config as configs
    from jaxvl.plan import chips, fit, tell

    if not config or not topology:
        raise ValueError(f"{'--topology' if config else '--config'} is missing; --table DIR needs neither")
    where = chips.topology(topology)
    plan = fit.make(configs.load(config, overrides), config, where, compiles=compiles, limit=limit, estimate=estimate)
    terminal.tell(json_.dumps(tell.as_json(plan), indent=1) if json else "\n".join(tell.lines(plan)))
    return 0


def table(folder: Path, *, limit: float, estimate: bool) -> int:
    """Print the table of the large recipes; see `scale`."""
    os.environ["JAX_PLATFORMS"] = "cpu"
    from jaxvl.plan import scale

    terminal.tell(scale.table(folder, limit=limit, estimate=estimate))
    return 0
