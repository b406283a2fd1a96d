"""Learning rate and temperature of the quickstart: 12 random points, of which only the better half at each evaluation goes on.

    jaxvl sweep --config=configs/sweeps/quickstart_search.py --workdir=runs/search --config.evals.val.every=100
"""
from jaxvl.sweep import Uniform


def sweep() -> dict:
    return dict(
        config="../clip_quickstart.py",
        metric="val/i2t/r@1",
        also=("val/t2i/r@1",),
        space={"optim.learning_rate": Uniform(2e-4, 2e-2, log=True), "method.temperature": Uniform(0.02, 0.5, log=True)},
        trials=12,
        keep=0.5,
    )
