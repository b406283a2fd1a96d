"""The memory model: which arrays it takes for split, and what it leaves out."""

import pytest

from jaxvl import assembly, config as configs
from jaxvl.mesh import MeshOptions
from jaxvl.plan import model, shapes


def temporaries(devices: int, *overrides: str) -> int:
    plan = shapes.planned(configs.read(configs.load("configs/clip_quickstart.py", ["train.batch_size=256", *overrides])))
    mesh = shapes.abstract(MeshOptions(), devices)
    return model.temporaries(plan, assembly.program(plan.parts, mesh, plan.steps), mesh)


def test_activations_are_split_over_devices():
    alone, eight = temporaries(1), temporaries(8)
    assert alone / 9 < eight < alone / 4


def test_what_only_the_gradients_of_frozen_leaves_would_read_is_not_kept():
    trained, frozen = temporaries(1), temporaries(1, "optim.groups=(('^image/', 0.0),)")
    assert frozen < 0.7 * trained
    assert temporaries(1, "optim.groups=(('^image/', 0.0), ('^text/', 0.0))") < 0.7 * frozen


@pytest.mark.parametrize(
    ("shape", "split"),
    [
        ((512, 7), True),
        ((12, 1024, 7), True),
        ((32, 16, 7), True),
        ((8, 1, 257), True),
        ((7, 8), False),
        ((1, 257, 768), False),
        ((16, 32, 3), True),
    ],
)
def test_which_arrays_hold_rows_of_the_batch(shape, split):
    assert model._has_rows(shape, rows=512, parts=8) is split
