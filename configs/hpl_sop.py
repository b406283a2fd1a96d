"""HPL on Stanford Online Products: 11,318 products for training, 11,316 others for testing.

    jaxvl train --config=configs/hpl_sop.py --workdir=/runs/hpl_sop

TFDS's splits are the published ones. A given hierarchy is the twelve kinds of product, and a learned one has as many groups.
"""

from hpl_cub200 import get_config as cub200
from ml_collections import ConfigDict

EPOCH = 496  # steps of 120 of the 59,551 images


def get_config(backbone: str = "dinov2") -> ConfigDict:
    config = cub200(backbone)
    config.method.update(classes=11_318, hierarchy_start=30 * EPOCH, num_coarse=(12,))
    config.data.update(source=("tfds://stanford_online_products/train",), label="class_id", classes="all", hierarchy="super_class_id")
    config.optim.update(learning_rate=6e-4, step_every=20 * EPOCH, step_factor=0.25, hold=(("^image/(?!head)", EPOCH),))
    config.checkpoint.update(every=5 * EPOCH)
    config.evals = dict(
        test=dict(
            kind="metric_learning", source="tfds://stanford_online_products/test", label="class_id", ks=(1, 10, 100, 1000), every=10 * EPOCH
        )
    )
    return config
