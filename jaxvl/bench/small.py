"""What `jaxvl bench step` measures without a config: two towers of 256 channels, seconds a step on a laptop, and large enough
that matrix products decide. The data section gives only the image size; nothing is read.
"""

from ml_collections import ConfigDict


def get_config() -> ConfigDict:
    config = ConfigDict()
    config.method = dict(name="clip", width=128)
    config.image = dict(variant="", patch=16, width=256, depth=6, heads=4, mlp_dim=1024, dtype="float32")
    config.text = dict(variant="", width=256, depth=4, heads=4, mlp_dim=1024, dtype="float32")
    config.tokenizer = dict(name="bpe", vocab_size=8192, context_length=32)
    config.data = dict(source="glyphs://train", image_size=112)
    config.train = dict(batch_size=64, steps=100)
    return config
