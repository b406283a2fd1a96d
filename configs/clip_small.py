"""CLIP from scratch on a few thousand pairs: a folder of your own images, emoji, textbook figures; minutes on a laptop.

    jaxvl train --config=configs/clip_small.py --workdir=runs/mine \
        --config.data.source="mine/train-*.tar" --config.evals.val.source="mine/val-*.tar"

So little data asks for small towers, strong augmentation and every caption a picture has.
"""

from ml_collections import ConfigDict


def get_config() -> ConfigDict:
    config = ConfigDict()
    config.seed = 0
    config.method = dict(name="clip", width=128)
    config.image = dict(variant="", patch=16, width=128, depth=3, heads=4, mlp_dim=512, pool="mean", class_tokens=0, dtype="float32")
    config.text = dict(variant="", width=128, depth=1, heads=4, mlp_dim=512, dtype="float32")
    config.tokenizer = dict(vocab_size=4_096, context_length=24)
    config.data = dict(source="train-*.tar", image_size=64, crop_scale=(0.5, 1.0), captions="random")
    config.augment = dict(mean=(0.5, 0.5, 0.5), std=(0.5, 0.5, 0.5), flip=0.5, jitter=(0.2, 0.2, 0.2, 0.0))
    config.optim = dict(learning_rate=1e-3, warmup_steps=100, weight_decay=0.2)
    config.train = dict(batch_size=128, epochs=30.0)
    config.checkpoint = dict(every=200, best="val/rsum")
    config.log = dict(every=10)
    config.evals = dict(val=dict(kind="retrieval", source="val-*.tar", every=200, group="caption"))
    return config
