"""CODIS on four million images (Duan et al. 2022), on data and recipe of albef_4m: a codebook and its terms are all that differs.

    jaxvl import facebook/deit-base-patch16-224 --out=imports/deit
    jaxvl import google-bert/bert-base-uncased --out=imports/bert
    jaxvl train --config=configs/codis_4m.py --workdir=/runs/codis_4m

The published batch is 64 pairs on each of 8 devices of 40 GB; with fewer devices or less memory raise method.chunks (parts in which
teacher and fusion layers go through the batch) and train.accumulate (parts of the towers), which change no loss. Codes are not decayed,
since their length means nothing.
"""

from albef_4m import get_config as base
from ml_collections import ConfigDict


def get_config() -> ConfigDict:
    config = base()
    for key in ("profile", "align"):  # TCL's; what "reference" stands for are CODIS's own defaults
        del config.method[key]
    config.method.update(name="codis", codes=4_000)
    return config
