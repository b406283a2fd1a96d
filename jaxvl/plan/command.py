"""The verb `jaxvl plan`."""
import json as json_
import os
from collections.abc import Sequence


def main(config: str, overrides: Sequence[str], topology: str, *, compiles: int, limit: float, json: bool) -> int:
    """Print the plan of a config for a topology. Raises ValueError for what cannot be planned, naming it."""
    os.environ["JAX_PLATFORMS"] = "cpu"  # planning uses no accelerator of this machine; must precede any import of jax
    from jaxvl import config as configs
    from jaxvl.plan import chips, fit, tell

    where = chips.topology(topology)
    plan = fit.make(configs.load(config, overrides), config, where, compiles=compiles, limit=limit)
    print(json_.dumps(tell.as_json(plan), indent=1) if json else "\n".join(tell.lines(plan)))
    return 0
