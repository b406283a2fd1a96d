"""HPL from scratch on a few thousand images, tested on classes it has never seen: about two minutes on one CPU core.

    jaxvl train --config=configs/hpl_small.py --workdir=runs/glyphs
    jaxvl train --config=configs/hpl_small.py:emoji --workdir=runs/emoji \
        --config.data.source="emoji/train-*.tar" --config.evals.val.source="emoji/val-*.tar"

The argument says which entry of the samples' `hierarchy` field is the given hierarchy: for `glyphs` (the default) the letter with its case
and accents taken off, for `emoji` the subgroup. A learned hierarchy has as many groups as the given one, so that rows of one table differ
in what is grouped and not in how finely; with other data set method.num_coarse. What the paper compares is one override each:

    --config.method.hierarchy=none                                      the base loss alone, Proxy-Anchor
    --config.method.hierarchy=given                                     the data's own hierarchy
    --config.method.coarse_mode=free                                    a learned one whose proxies train, or tied (the default is frozen)
    --config.method.base_loss=proxy_nca_pp                              Proxy-NCA++, with any of the above
"""

from ml_collections import ConfigDict

SETS = {
    "glyphs": dict(source="glyphs://train", val="glyphs://val", level=2, groups=288, rate=1e-3, steps=450),
    "emoji": dict(source="train-*.tar", val="val-*.tar", level=1, groups=97, rate=3e-4, steps=300),
}


def get_config(data: str = "glyphs") -> ConfigDict:
    of = SETS[data]
    config = ConfigDict()
    config.seed = 0
    config.method = dict(name="hpl", width=64, level_weights=(1.0, 0.25), num_coarse=(of["groups"],), hierarchy_start="half")
    # Four large patches: so few images train little more than a perceptron, where small patches and their mean lose what is where.
    config.image = dict(
        variant="", patch=20, width=192, depth=2, heads=3, mlp_dim=384, pool="mean", class_tokens=0, head_bias=True, dtype="float32"
    )
    config.data = dict(source=of["source"], image_size=40, crop_scale=(0.8, 1.0), captions="none", label="class", classes="all",
                       hierarchy="hierarchy", levels=(of["level"],), per_class=2)  # fmt: skip
    config.augment = dict(mean=(0.95, 0.95, 0.95), std=(0.3, 0.3, 0.3))  # of pictures on white
    config.optim = dict(learning_rate=of["rate"], schedule="cosine", warmup_steps=20, b2=0.999, eps=1e-8, weight_decay=1e-4, decay="",
                        groups=(("^(proxies|coarse)", 10.0),), clip_norm=0.0, clip_value=10.0)  # fmt: skip
    config.train = dict(batch_size=128, steps=of["steps"])
    config.checkpoint = dict(every=of["steps"])
    config.log = dict(every=20)
    config.evals = dict(val=dict(kind="metric_learning", source=of["val"], every=of["steps"] // 2))
    return config
