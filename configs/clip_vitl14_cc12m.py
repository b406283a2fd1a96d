"""CLIP ViT-L/14 on CC12M: the B/16 recipe, wider, with parameters sharded and activations rematerialised.

jaxvl train --config=configs/clip_vitl14_cc12m.py --workdir=/runs/clip_l14
"""

from clip_vitb16_cc12m import get_config as base
from ml_collections import ConfigDict


def get_config() -> ConfigDict:
    config = base()
    config.method.width = 768
    config.image = dict(variant="L/14", pool="cls", pre_norm=True, remat="branches")
    config.text = dict(variant="B", causal=True, pool="eos", remat="branches")
    config.optim.learning_rate = 5e-4
    config.mesh = dict(data=-1, fsdp=8, tensor=1)
    return config
