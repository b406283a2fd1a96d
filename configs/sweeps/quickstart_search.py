"""Learning rate and temperature of the quickstart: 12 points, of which at each evaluation only the better half goes on.

    jaxvl sweep --config=configs/sweeps/quickstart_search.py --workdir=runs/search --config.evals.val.every=100

With `quickstart_search.py:tpe` each point is drawn from what the ones before it gave, and several such commands, on several
machines that share the folder, work on one study.
"""

from jaxvl.sweep import Uniform


def sweep(sampler: str = "random") -> dict:
    return dict(
        config="../clip_quickstart.py",
        metric="val/i2t/r@1",
        also=("val/t2i/r@1",),
        space={"optim.learning_rate": Uniform(2e-4, 2e-2, log=True), "method.temperature": Uniform(0.02, 0.5, log=True)},
        trials=12,
        sampler=sampler,
        keep=0.5,
    )
