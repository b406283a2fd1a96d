"""CLIP on the embedded glyphs: a first run that ends with a model in minutes on two CPU cores.

launch/quickstart
"""

from ml_collections import ConfigDict


def get_config() -> ConfigDict:
    config = ConfigDict()
    config.seed = 0
    config.method = dict(name="clip", width=96)
    config.image = dict(
        variant="", patch=10, width=96, depth=3, heads=3, mlp_dim=384, pool="mean", class_tokens=0, act="quick_gelu", dtype="float32"
    )
    config.text = dict(variant="", width=96, depth=1, heads=3, mlp_dim=384, act="quick_gelu", dtype="float32")
    config.tokenizer = dict(vocab_size=1_024, context_length=16)
    config.data = dict(source="glyphs://train?size=6000", image_size=40, crop_scale=(0.8, 1.0), captions="first")
    config.augment = dict(mean=(0.5, 0.5, 0.5), std=(0.5, 0.5, 0.5))
    config.optim = dict(learning_rate=2e-3, warmup_steps=80, weight_decay=0.1)
    config.train = dict(batch_size=128, steps=900)
    config.checkpoint = dict(every=300, best="val/i2t/r@1")
    config.log = dict(every=10)
    config.evals = dict(val=dict(kind="retrieval", source="glyphs://val-seen", every=300))
    return config
