"""Retrieval on COCO fine-tuned from a run of tcl_4m, or from a published checkpoint, at 384 pixels (Yang et al. 2022, section 4.2).

    jaxvl data make dataset_coco.json --images=/data/coco/images --split=train,restval --out=/data/coco-ft/train
    jaxvl data make dataset_coco.json --images=/data/coco/images --split=val --out=/data/coco-ft/val          and so for test
    jaxvl train --config=configs/retrieval_coco_ft.py --workdir=/runs/tcl_coco

From published weights: jaxvl import TCL_4M.safetensors --out=imports/tcl, then --config.init.whole=imports/tcl. A sample is an image with
five captions of which a step sees one, so that five passes over the pairs are 25 over the samples.
"""

from ml_collections import ConfigDict
from tcl_4m import get_config as base

EPOCH = 2_214  # steps: 566,747 pairs


def get_config() -> ConfigDict:
    config = base()
    # Images of one id are positives of each other; whatever the queues carry over from pre-training has no id.
    config.method.update(ids=True, mlm=False, group_size=32, alpha_steps=EPOCH)
    config.init = dict(whole="/runs/tcl_4m")
    config.tokenizer.context_length = 30
    config.data.update(source="/data/coco-ft/train", image_size=384, crop_scale=(0.5, 1.0), id="image_id", group_shards=0)
    config.optim.update(learning_rate=1e-5, epochs=5, warmup_steps=0)
    config.train = dict(batch_size=256, steps=5 * EPOCH)
    config.checkpoint = dict(every=EPOCH, keep=1, best="val/rsum")
    config.evals = dict(
        val=dict(kind="rerank", source="/data/coco-ft/val", captions=5, k_test=256, every=EPOCH),
        test=dict(kind="rerank", source="/data/coco-ft/test", captions=5, k_test=256),
    )
    return config
