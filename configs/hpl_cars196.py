"""HPL on Cars-196, the first 98 models for training and the others for testing; `hpl_cub200` otherwise.

    jaxvl train --config=configs/hpl_cars196.py --workdir=/runs/hpl_cars

A given hierarchy is the type of body, the word before the year in a model's name; a learned one has as many groups.
"""

from hpl_cub200 import WARM, get_config as cub200
from ml_collections import ConfigDict

SPLITS = ("tfds://cars196/train", "tfds://cars196/test")
EPOCH = 67  # steps of 120 of the 8,054 images
BODIES = 17  # before the year of the first 98 models: Convertible, Coupe, Hatchback, Sedan, SUV, ..., and a few trim levels


def get_config(backbone: str = "dinov2") -> ConfigDict:
    config = cub200(backbone)
    config.method.update(classes=98, hierarchy_start=20 * EPOCH, num_coarse=(BODIES,))
    config.data.update(source=SPLITS, hierarchy=r"re:(\S+) \d{4}$")
    config.optim.update(step_every=10 * EPOCH, hold=(("^image/(?!head)", WARM[backbone] * EPOCH),))
    config.checkpoint.update(every=10 * EPOCH)
    config.evals.test.update(source=SPLITS, every=5 * EPOCH)
    return config
