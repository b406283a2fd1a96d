"""TCL from scratch on a few thousand pairs: emoji, textbook figures, glyphs, or a folder of your own; about ten minutes on one core.

    jaxvl train --config=configs/tcl_small.py --workdir=runs/tcl                      reads emoji/train-*.tar, emoji/val-*.tar
    jaxvl train --config=configs/tcl_small.py:textbook --workdir=runs/tcl_textbook    reads textbook/...
    jaxvl train --config=configs/tcl_small.py:glyphs --workdir=runs/tcl_glyphs        the embedded set

Emoji of several vendors share their captions, so an item with an equal caption counts as right (evals.*.group), and chance stands beside.
The paper's ablation is one override: --config.method.align=cma (ALBEF), cma+imc, cma+lmi. Data elsewhere:
--config.data.source="mine/train-*.tar", and --config.evals.val.source and --config.evals.rerank.source="mine/val-*.tar".
"""

from ml_collections import ConfigDict


def get_config(data: str = "emoji") -> ConfigDict:
    train, val = ("glyphs://train?size=4000", "glyphs://val-seen") if data == "glyphs" else (f"{data}/train-*.tar", f"{data}/val-*.tar")
    config = ConfigDict()
    config.seed = 0
    # A teacher and queues of the paper's length would still be full of the first steps when so short a run ends.
    config.method = dict(name="tcl", profile="fixed", width=64, fusion_depth=1, queue=1_024, momentum=0.98, alpha_steps=100, mlm_cap=4)
    config.image = dict(variant="", patch=8, width=96, depth=3, heads=4, mlp_dim=384, pool="cls", dtype="float32")
    config.text = dict(variant="", width=96, depth=1, heads=4, mlp_dim=384, causal=False, pool="first", dtype="float32")
    config.tokenizer = dict(vocab_size=2_048, context_length=12)
    config.data = dict(source=train, image_size=32, crop_scale=(0.8, 1.0), captions="first" if data == "glyphs" else "random")
    config.augment = dict(
        views=2, mean=(0.5, 0.5, 0.5), std=(0.5, 0.5, 0.5), flip=0.0 if data == "glyphs" else 0.5, jitter=(0.2, 0.2, 0.2, 0.0)
    )
    config.optim = dict(learning_rate=3e-3, warmup_steps=100, b2=0.999, weight_decay=0.05)
    config.train = dict(batch_size=128, steps=800)
    config.checkpoint = dict(every=200, best="val/rsum")
    config.log = dict(every=10)
    config.evals = dict(
        val=dict(kind="retrieval", source=val, every=200, group="caption"),
        rerank=dict(kind="rerank", source=val, every=800, k_test=16, group="caption"),
    )
    return config
