"""SigLIP on the embedded glyphs, otherwise as clip_quickstart.

jaxvl train --config=configs/siglip_quickstart.py --workdir=runs/siglip
"""

from clip_quickstart import get_config as base
from ml_collections import ConfigDict


def get_config() -> ConfigDict:
    config = base()
    config.method = dict(name="siglip", width=96)
    return config
