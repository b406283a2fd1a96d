"""JVSM from scratch on a few thousand small pictures with triplets beside the shards: the embedded glyphs, or emoji.

    jaxvl train --config=configs/jvsm_small.py --workdir=runs/jvsm
    jaxvl train --config=configs/jvsm_small.py --workdir=runs/jvsm_emoji \
        --config.data.source="emoji/train-*.tar" --config.data.image_size=64 --config.image.patch=16 --config.evals.val.source="emoji/val-*.tar"

Characters of val are never seen in training, and neither are its emoji.
"""

from ml_collections import ConfigDict


def get_config() -> ConfigDict:
    config = ConfigDict()
    config.seed = 0
    config.method = dict(name="jvsm", width=128)
    config.image = dict(
        variant="", patch=10, width=96, depth=3, heads=3, mlp_dim=384, pool="mean", class_tokens=0, head_bias=True, dtype="float32"
    )
    config.text = dict(kind="lstm", word_dim=64, width=128)
    config.tokenizer = dict(name="words", context_length=16, vocab_size=4_096)
    config.data = dict(source="glyphs://train?size=3000", triplets="beside", image_size=40, crop_scale=(0.8, 1.0), crop_ratio=(1.0, 1.0))
    config.augment = dict(mean=(0.5, 0.5, 0.5), std=(0.5, 0.5, 0.5))
    config.optim = dict(learning_rate=1e-3, warmup_steps=50, weight_decay=0.05)
    config.train = dict(batch_size=64, steps=750)
    config.checkpoint = dict(every=1000, best="val/composed/r@1")
    config.log = dict(every=20)
    config.evals = dict(val=dict(kind="composed", source="glyphs://val", every=250))
    return config
