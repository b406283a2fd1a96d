"""CODIS from scratch on a few thousand pairs: emoji, textbook figures, glyphs, or a folder of your own; four minutes on one core.

    jaxvl train --config=configs/codis_small.py --workdir=runs/codis                      reads emoji/train-*.tar, emoji/val-*.tar
    jaxvl train --config=configs/codis_small.py:textbook --workdir=runs/codis_textbook    reads textbook/...
    jaxvl train --config=configs/codis_small.py:glyphs --workdir=runs/codis_glyphs        the embedded set

What the paper leaves open is one override each: --config.method.codes=256, --config.method.ot_solver=sinkhorn,
--config.method.ot_scope=local, --config.method.code_temperature=0 (the learned one), --config.method.ipot_iterations=200,
--config.method.ica_intra=hard, --config.method.code=False (no codebook). Data elsewhere: --config.data.source="mine/train-*.tar" and
--config.evals.val.source="mine/val-*.tar", --config.evals.rerank.source likewise.
"""
from ml_collections import ConfigDict


def get_config(data: str = "emoji") -> ConfigDict:
    train, val = ("glyphs://train?size=4000", "glyphs://val-seen") if data == "glyphs" else (f"{data}/train-*.tar", f"{data}/val-*.tar")
    config = ConfigDict()
    config.seed = 0
    # A teacher and queues of the paper's length would still be full of the first steps when so short a run ends.
    config.method = dict(name="codis", width=64, fusion_depth=1, codes=128, queue=1_024, momentum=0.98, alpha_steps=100,
                         unfilled="mask", scope="global", ot_group=32, mlm_cap=4)  # fmt: skip
    config.image = dict(variant="", patch=8, width=96, depth=3, heads=4, mlp_dim=384, pool="cls", dtype="float32")
    config.text = dict(variant="", width=96, depth=1, heads=4, mlp_dim=384, causal=False, pool="first", dtype="float32")
    config.tokenizer = dict(vocab_size=2_048, context_length=12)
    config.data = dict(source=train, image_size=32, crop_scale=(0.5, 1.0), captions="first" if data == "glyphs" else "random")
    config.augment = dict(mean=(0.5, 0.5, 0.5), std=(0.5, 0.5, 0.5), flip=0.0 if data == "glyphs" else 0.5, jitter=(0.2, 0.2, 0.2, 0.0))
    config.optim = dict(learning_rate=1e-3, warmup_steps=100, b2=0.999, weight_decay=0.05)
    config.train = dict(batch_size=128, steps=800)
    config.checkpoint = dict(every=200, best="val/rsum")
    config.log = dict(every=10)
    config.evals = dict(
        val=dict(kind="retrieval", source=val, every=200),
        rerank=dict(kind="rerank", source=val, every=800, k_test=16),
    )
    return config
