"""LexVLA from scratch in minutes: a tiny decoder and ViT, its words those of the captions, read off a few thousand pictures.

    jaxvl train --config=configs/lexvla_mini.py --workdir=runs/emoji \
        --config.data.source="emoji/train-*.tar" --config.evals.val.source="emoji/val-*.tar"
    jaxvl words runs/emoji
    jaxvl train --config=configs/lexvla_mini.py:glyphs --workdir=runs/glyphs

With ":textbook" the settings are those for its longer captions; ":glyphs" needs no files. --config.method.penalty=flops | none are the
ablations; configs/sweeps/lexical.py compares them. A decoder that has read nothing knows no words, so it is taught those of its captions
(method.word_weight), and all of it trains besides its adapters. The two real sets take under two minutes of one core.
"""

from ml_collections import ConfigDict

SETS = {
    "emoji": dict(source="train-*.tar", val="val-*.tar", patch=8, captions="random", steps=300, often=8),
    "textbook": dict(source="train-*.tar", val="val-*.tar", patch=8, captions="random", steps=300, often=16, caption_length=24),
    "glyphs": dict(source="glyphs://train?size=6000", val="glyphs://val-seen", patch=10, captions="first", steps=600, often=2),
}


def get_config(name: str = "emoji") -> ConfigDict:
    if name not in SETS:
        raise ValueError(f"configs/lexvla_mini.py:{name}: it takes {', '.join(SETS)}")
    chosen = SETS[name]
    longest = chosen.get("caption_length", 12)
    config = ConfigDict()
    config.seed = 0
    # In some hundred steps the penalties move something only with weights a thousand times the paper's.
    config.method = dict(
        name="lexvla",
        adapter_heads=2,
        mlp1=128,
        mlp2=128,
        frozen_image=False,
        word_weight=1.0,
        text_codebook="trained",
        image_weight=1.0,
        text_weight=1.0,
        penalty_warmup=100,
    )
    config.image = dict(variant="", patch=chosen["patch"], width=64, depth=2, heads=2, mlp_dim=256, dtype="float32")
    config.text = dict(variant="", width=128, depth=1, heads=2, mlp_dim=256, position="rope", norm="rms", gated=True, act="silu", pool="last",
                       qkv_bias=False, out_bias=False, mlp_bias=False, dtype="float32")  # fmt: skip
    config.lora = dict(rank=4, alpha=8.0, targets=r"^text/blocks/(attn/(q|k|v|out)|mlp/(up|gate|down))/kernel$", base_dtype="float32")
    config.tokenizer = dict(name="words", vocab_size=8_192, context_length=8 + longest, end=False, prompt='the focus of "{}" lies on important words', caption_length=longest,
                            lexicon="ascii_lower_len2", lexicon_min_count=chosen["often"])  # fmt: skip
    config.data = dict(source=chosen["source"], image_size=40, crop_scale=(0.7, 1.0), captions=chosen["captions"])
    config.augment = dict(mean=(0.5, 0.5, 0.5), std=(0.5, 0.5, 0.5))
    config.optim = dict(learning_rate=2e-3, schedule="cosine", warmup_steps=40, b2=0.999, weight_decay=0.05,
                        groups=((r"^(image|adapter|(image|text)_codebook|text|t$)($|/)", 1.0),))  # fmt: skip
    config.train = dict(batch_size=64, steps=chosen["steps"])
    config.checkpoint = dict(every=250, best="val/rsum")
    config.log = dict(every=10)
    config.evals = dict(val=dict(kind="lexical", source=chosen["val"], every=0, group="caption"))
    return config
