"""JVSM on Fashion-IQ: the three categories trained together and evaluated each on its own, every caption a query of its own.

    jaxvl data make fashioniq:/data/fashion-iq --out=/data/fiq --part=train
    jaxvl data make fashioniq:/data/fashion-iq --out=/data/fiq --part=val
    jaxvl train --config=configs/jvsm_fashioniq.py --workdir=/runs/fiq --config.init.image=/models/mobilenet

Galleries "original" (all images of the split) and "val" (those in triplets), captions "single" and "joined" make four protocols that
cannot be compared; every number carries its own in its name.
"""

from jvsm_fashion200k import get_config as base
from ml_collections import ConfigDict


def get_config() -> ConfigDict:
    config = base()
    config.data.update(
        source="/data/fiq/train-*.tar",
        triplets="beside",
        triplet_text="single",
        captions="optional",
        draws=1,
        image_size=256,
        crop_scale=(0.83, 1.0),
    )
    config.optim.update(schedule="constant")
    config.train = dict(batch_size=32, steps=50_000)
    config.checkpoint = dict(every=5_000, best="val/original,single/composed/r@10")
    protocols = {
        "val": ("original", "single"),
        "val_union": ("val", "single"),
        "val_joined": ("original", "joined"),
        "val_union_joined": ("val", "joined"),
    }
    config.evals = {
        name: dict(
            kind="composed", source="/data/fiq/val-*.tar", gallery=gallery, texts=texts, ks=(10, 50), every=5_000 if name == "val" else 0
        )
        for name, (gallery, texts) in protocols.items()
    }
    return config
