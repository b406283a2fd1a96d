"""ALBEF (Li et al. 2021) on the data of tcl_4m: one view of an image, alignment across modalities alone, weaker augmentation.

jaxvl train --config=configs/albef_4m.py --workdir=/runs/albef_4m
"""

from ml_collections import ConfigDict
from tcl_4m import get_config as base

AUGMENT = dict(views=1, flip=0.5, randaugment=2, randaugment_level=7.0, randaugment_prob=0.5)


def get_config() -> ConfigDict:
    config = base()
    config.method.align = "cma"
    config.augment = AUGMENT
    return config
