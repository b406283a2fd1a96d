"""LexVLA on CC12M (Li et al. 2024): Llama 2 7B with adapters, a frozen DINOv2 B/14, 17,182 words, batches of 6,144 for 12 epochs.

    jaxvl import meta-llama/Llama-2-7b-hf --out=/models/llama2-7b
    jaxvl import facebook/dinov2-base --out=/models/dinov2-b14
    jaxvl train --config=configs/lexvla_cc12m.py --workdir=/runs/lexvla \
        --config.init.text=/models/llama2-7b --config.init.image=/models/dinov2-b14 \
        --config.tokenizer.name=/models/llama2-7b/tokenizer --config.data.source="/data/cc12m/{00000..01242}.tar"

Any other decoder or encoder takes the place of these two by `jaxvl import`, which prints its config.text and config.image. Penalties by one
override: --config.method.penalty=flops | none. With configs/lexvla_cc12m.py:/data/coco the run measures PatchDis on the 2017 validation images there.
"""

from ml_collections import ConfigDict


def get_config(coco: str = "") -> ConfigDict:
    config = ConfigDict()
    config.seed = 0
    config.method = dict(name="lexvla", entries=17_182)
    config.image = dict(variant="B/14", class_tokens=1, layer_scale=1.0, mask_token=True, drop_remainder=True)
    # 32,000 pieces, and a row in front for padding, which their tokenizer does not have.
    config.text = dict(variant="", vocab_size=32_001, width=4_096, depth=32, heads=32, mlp_dim=11_008, position="rope", norm="rms", gated=True, act="silu",
                       pool="last", qkv_bias=False, out_bias=False, mlp_bias=False, init_std=0.02, remat="full")  # fmt: skip
    config.lora = dict(rank=8, alpha=16.0, targets=r"^text/blocks/(attn/(q|k|v|out)|mlp/(up|gate|down))/kernel$")
    config.tokenizer = dict(name="/models/llama2-7b/tokenizer", vocab_size=32_000, context_length=116, end=False, prompt="focus", caption_length=64,
                            lexicon="ascii_lower_len2")  # fmt: skip
    # The paper says nothing of crops: a random square of all the shorter side, where evaluation takes the middle one.
    config.data = dict(
        source="/data/cc12m/{00000..01242}.tar", image_size=224, crop="side", crop_scale=(1.0, 1.0), captions="first", group_shards=32
    )
    config.augment = dict(mean=(0.485, 0.456, 0.406), std=(0.229, 0.224, 0.225))
    # Adam of the paper: no decay, no clipping. Besides the adapters of the decoder these train, and all else stands still.
    config.optim = dict(learning_rate=5e-4, schedule="cosine", b1=0.9, b2=0.999, eps=1e-8, weight_decay=0.0, clip_norm=0.0,
                        groups=((r"^(adapter|image_codebook|t$)", 1.0),))  # fmt: skip
    config.train = dict(batch_size=6_144, epochs=12.0)
    config.mesh = dict(data=-1, fsdp=8, tensor=1)
    config.checkpoint = dict(every=500, keep=3, best="val/i2t/r@1")
    config.log = dict(every=20)
    config.evals = dict(
        val=dict(kind="lexical", source="/data/cc12m-val/{00000..00001}.tar", every=1_000, top=(28, 64, 296, 512, 1_081, 3_290, 6_070))
    )
    if coco:
        config.evals.patchdis = dict(
            kind="patchdis", source=f"{coco}/annotations/instances_val2017.json", images=f"{coco}/val2017", every=0
        )
    return config
