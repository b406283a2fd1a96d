"""JVSM on Fashion-IQ: the three categories trained together, every caption a text of its own, and evaluated each on its own.

    jaxvl data make fashioniq:/data/fashion-iq --out=/data/fiq --part=train
    jaxvl data make fashioniq:/data/fashion-iq --out=/data/fiq --part=val
    jaxvl train --config=configs/jvsm_fashioniq.py --workdir=/runs/fiq --config.init.image=/models/mobilenet

Official is one query a triplet, its two captions joined, among all images of the category's split (dress 3,817, shirt 6,346, toptee 5,373,
fewer where images are missing: .../gallery says). JVSM and VAL made each caption a query ("single"), and some rank only the images of
triplets ("val"); these four protocols cannot be compared, so every number carries its own in its name.
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
        crop_scale=(256 / 280, 1.0),  # VAL resizes the shorter side to between 256 and 280 pixels and cuts 256 out
    )
    config.optim.update(schedule="constant")
    config.train = dict(batch_size=32, steps=50_000)
    config.checkpoint = dict(every=5_000, best="val/original,joined/composed/r@10")
    protocols = {
        "val": ("original", "joined"),
        "val_union": ("val", "joined"),
        "val_single": ("original", "single"),
        "val_union_single": ("val", "single"),
    }
    config.evals = {
        name: dict(
            kind="composed", source="/data/fiq/val-*.tar", gallery=gallery, texts=texts, ks=(10, 50), every=5_000 if name == "val" else 0
        )
        for name, (gallery, texts) in protocols.items()
    }
    return config
