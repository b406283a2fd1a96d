"""CLIP ViT-B/16 on CC12M from scratch (Radford et al. 2021, with the shorter schedule that 12 million pairs ask for).

    jaxvl train --config=configs/clip_vitb16_cc12m.py --workdir=/runs/clip_b16 \
        --config.data.source="/data/cc12m/{00000..01242}.tar"

Written for 32 or more accelerators; on fewer, raise train.accumulate, which keeps all in-batch negatives.
"""

from ml_collections import ConfigDict


def get_config() -> ConfigDict:
    config = ConfigDict()
    config.seed = 0
    config.method = dict(name="clip", width=512, impl="ring")
    config.image = dict(variant="B/16", pool="cls", pre_norm=True)
    config.text = dict(variant="M", causal=True, pool="eos")
    config.tokenizer = dict(name="bpe", vocab_size=49_408, context_length=77)
    config.data = dict(source="/data/cc12m/{00000..01242}.tar", image_size=224, crop_scale=(0.9, 1.0), captions="first", group_shards=32)
    config.augment = dict(mean=(0.4815, 0.4578, 0.4082), std=(0.2686, 0.2613, 0.2758))
    # Weight decay and beta2 are CLIP's table 19; the peak rate is what a batch of 8k on CC12M takes.
    config.optim = dict(learning_rate=1e-3, schedule="cosine", warmup_steps=2_000, weight_decay=0.2, b2=0.98, eps=1e-6, clip_norm=1.0)
    config.train = dict(batch_size=8_192, epochs=32.0)
    config.mesh = dict(data=-1, fsdp=1, tensor=1)
    config.checkpoint = dict(every=1_000, keep=3, best="val/i2t/r@1")
    config.log = dict(every=50)
    config.evals = dict(val=dict(kind="retrieval", source="/data/cc12m-val/{00000..00001}.tar", every=2_000))
    return config
