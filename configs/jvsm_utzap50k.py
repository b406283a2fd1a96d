"""JVSM on UT-Zap50k: pairs of shoes that differ in one attribute, "replace A with B"; captions are the attributes joined.

    jaxvl data make utzap50k:/data/ut-zap50k --out=/data/zap --part=train
    jaxvl data make utzap50k:/data/ut-zap50k --out=/data/zap --part=test
    jaxvl train --config=configs/jvsm_utzap50k.py --workdir=/runs/zap --config.init.image=/models/mobilenet

How the paper made its texts and its split is not known, so these numbers are not its numbers.
"""

from jvsm_fashion200k import get_config as base
from ml_collections import ConfigDict

ATTRIBUTES = ("Category", "SubCategory", "HeelHeight", "Insole", "Closure", "Gender", "Material", "ToeStyle")


def get_config() -> ConfigDict:
    config = base()
    config.data.update(source="/data/zap/train-*.tar", triplets="attributes", attributes=ATTRIBUTES, draws=1)
    config.train = dict(batch_size=32, steps=50_000)
    config.evals = dict(test=dict(kind="composed", source="/data/zap/test-*.tar", right="caption", ks=(1, 10, 50), every=5_000))
    return config
