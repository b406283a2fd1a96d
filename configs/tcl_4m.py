"""TCL on the four million images of ALBEF (Yang et al. 2022): COCO, Visual Genome, SBU and Conceptual Captions 3M.

    jaxvl import facebook/deit-base-patch16-224 --out=imports/deit
    jaxvl import google-bert/bert-base-uncased --out=imports/bert
    jaxvl train --config=configs/tcl_4m.py --workdir=/runs/tcl_4m

Shards hold an image with all its captions (`jaxvl data make annotations.json`). The published run took eight devices of 64 pairs; its
in-batch negatives came from these 64, which method.group_size keeps on any number of devices.
"""

from ml_collections import ConfigDict

SETS = "/data/{coco/train-{000..113},vg/{000..100},sbu/{000..860},cc3m/{00000..00287}}.tar"
EPOCH = 10_000  # steps: 5.1 million pairs of an image and one of its captions


def get_config() -> ConfigDict:
    config = ConfigDict()
    config.seed = 0
    # A caption of 25 tokens hides 3.6 on average, and more than 12 in one of a hundred thousand.
    config.method = dict(
        name="tcl",
        profile="reference",
        width=256,
        fusion_depth=6,
        queue=65_536,
        momentum=0.995,
        alpha=0.4,
        alpha_steps=EPOCH,
        group_size=64,
        mlm_cap=12,
    )
    config.image = dict(variant="B/16", pool="cls")
    config.text = dict(variant="B", depth=6, vocab_size=30_522, positions=512, token_types=2, causal=False, pool="first", embed_norm=True, final_norm=False,
                       post_norm=True, eps=1e-12, dropout=0.1, attention_dropout=0.1, init_std=0.02)  # fmt: skip
    # The published ViT keeps the 1e-6 of DeiT's own code, where the imported file says 1e-12.
    config.init = dict(image="imports/deit", text="imports/bert", differ=("eps",))
    config.tokenizer = dict(name="imports/bert/tokenizer", context_length=25, end=False)
    config.data = dict(
        source=SETS, image_size=256, crop_scale=(0.2, 1.0), fit="squash", captions="random", cleaning="albef", max_words=30, group_shards=32
    )
    # augment.autocontrast="ref_bug" is what the published run saw.
    config.augment = dict(views=2, jitter=(0.4, 0.4, 0.4, 0.1), jitter_prob=0.8, grayscale=0.2, blur=0.5, blur_sigma=(0.1, 2.0), flip=0.5,
                          randaugment=2, randaugment_level=7.0, randaugment_prob=0.5)  # fmt: skip
    # All but vectors of one axis decays, temperature and position tables too, as in the published code.
    config.optim = dict(learning_rate=1e-4, schedule="epochs", epochs=30, end_factor=0.1, warmup_steps=2_000, warmup_from=0.1, warmup_every=100,
                        b1=0.9, b2=0.999, eps=1e-8, weight_decay=0.02, decay=r"(kernel|embed|types|pos|cls|temperature)$", clip_norm=0.0)  # fmt: skip
    config.train = dict(batch_size=512, steps=30 * EPOCH)
    config.mesh = dict(data=-1, fsdp=1, tensor=1)
    config.checkpoint = dict(every=2_000, keep=3, keep_every=5 * EPOCH, best="val/rsum")
    config.log = dict(every=50)
    val = dict(source="/data/coco/val-{000..004}.tar", captions=5)
    config.evals = dict(val=dict(kind="retrieval", every=EPOCH, **val), rerank=dict(kind="rerank", k_test=256, **val))
    return config
