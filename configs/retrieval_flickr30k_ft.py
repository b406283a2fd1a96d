"""Retrieval on Flickr30K fine-tuned from a run of tcl_4m, as retrieval_coco_ft.

    jaxvl data make dataset_flickr30k.json --images=/data/flickr30k/images --split=train --out=/data/flickr30k-ft/train
    jaxvl train --config=configs/retrieval_flickr30k_ft.py --workdir=/runs/tcl_flickr30k

The published zero-shot numbers on this set are of the model fine-tuned on COCO: jaxvl eval --workdir=/runs/tcl_coco with
--config.evals.test.source=/data/flickr30k-ft/test.
"""

from ml_collections import ConfigDict
from retrieval_coco_ft import get_config as base

EPOCH = 567  # steps: 145,000 pairs


def get_config() -> ConfigDict:
    config = base()
    config.method.alpha_steps = EPOCH
    config.data.source = "/data/flickr30k-ft/train"
    config.optim.epochs = 10
    config.train.steps = 10 * EPOCH
    config.checkpoint.every = EPOCH
    for name, section in config.evals.items():
        section.update(source=f"/data/flickr30k-ft/{name}", k_test=128)
    config.evals.val.every = EPOCH
    return config
