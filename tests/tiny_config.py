"""A run of seconds for the tests that kill, stop and resume it: a shipped recipe, shrunk, saving every 4 of 48 steps.

jaxvl train --config=tests/tiny_config.py:tcl_small --workdir=/tmp/run
"""

from pathlib import Path

from ml_collections import ConfigDict

from jaxvl.config import load
from jaxvl.tiny import shrink


def get_config(recipe: str = "clip_vitb16_cc12m") -> ConfigDict:
    """The recipe with EMA, and a learning rate at which the loss stays sensitive to every bit."""
    file = Path(__file__).resolve().parent.parent / "configs" / f"{recipe}.py"
    config = shrink(load(str(file)), steps=48, devices=4)
    config.checkpoint.update(every=4, keep=3)
    config.optim.update(ema_decay=0.99, learning_rate=1e-4)
    config.log.html = False
    config.evals = ConfigDict()
    return config
