"""CODIS on Conceptual 12M: data and recipe of tcl_cc12m, one view of an image as in albef_4m, codes split over the mesh.

    jaxvl train --config=configs/codis_cc12m.py --workdir=/runs/codis_cc12m --config.data.source="/data/cc12m/{00000..01242}.tar"

In-batch negatives and the transport plan are those of the whole batch, and queue entries count once they are written.
"""

from albef_4m import AUGMENT
from ml_collections import ConfigDict
from tcl_cc12m import get_config as base


def get_config() -> ConfigDict:
    config = base()
    del config.method["profile"]
    # With 2048 samples for 4096 codes a plan is sharper than the paper's, where 512 share out 4000.
    config.method.update(name="codis", codes=4_096, scope="global", unfilled="mask")
    config.augment = AUGMENT
    return config
