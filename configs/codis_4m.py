"""CODIS on four million images (Duan et al. 2022): COCO, Visual Genome, Conceptual Captions 3M and SBU, ALBEF's recipe.

    jaxvl train --config=configs/codis_4m.py --workdir=/runs/codis_4m \
        --config.init.image=/models/deit_b16 --config.init.text=/models/bert_base

The published batch is 64 pairs on each of 8 devices of 40 GB; with fewer devices or less memory raise method.chunks (parts in which
teacher and fusion layers go through the batch) and train.accumulate (parts of the towers), which change no loss.
"""

from ml_collections import ConfigDict


def get_config() -> ConfigDict:
    config = ConfigDict()
    config.seed = 0
    # One epoch has 5.1 million pairs, so alpha rises for as many steps.
    config.method = dict(name="codis", codes=4_000, mlm_cap=12, alpha_steps=9_960)
    config.image = dict(variant="B/16", pool="cls", eps=1e-6)
    config.text = dict(variant="B", depth=6, causal=False, pool="first", post_norm=True, embed_norm=True, final_norm=False, eps=1e-12,
                       token_types=2, positions=512, dropout=0.1, attention_dropout=0.1, init_std=0.02)  # fmt: skip
    config.tokenizer = dict(name="google-bert/bert-base-uncased", context_length=25, end=False)
    config.data = dict(
        source="/data/{coco,vg,cc3m,sbu}/*.tar", image_size=256, crop_scale=(0.2, 1.0), captions="random", cleaning="albef", group_shards=32
    )
    config.augment = dict(flip=0.5, randaugment=2, randaugment_level=7.0, views=1)
    # The optimiser decays everything but vectors in ALBEF; codes are not decayed, since their length means nothing.
    config.optim = dict(learning_rate=1e-4, schedule="epochs", epochs=30, warmup_steps=2_000, warmup_from=0.1, warmup_every=100, end_factor=0.1,
                        weight_decay=0.02, b2=0.999, eps=1e-8, clip_norm=0.0, decay=r"(kernel|embed|types|pos|cls|temperature)$")  # fmt: skip
    config.train = dict(batch_size=512, epochs=30.0)
    config.mesh = dict(data=-1, fsdp=1, tensor=1)
    config.checkpoint = dict(every=1_000, keep=3, best="val/rsum")
    config.log = dict(every=50)
    config.evals = dict(
        val=dict(kind="retrieval", source="/data/coco-val/*.tar", captions=5, every=5_000),
        rerank=dict(kind="rerank", source="/data/coco-val/*.tar", captions=5, k_test=256, every=50_000),
    )
    return config
