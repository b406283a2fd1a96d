"""ALBEF, TCL and CODIS on one small trunk from scratch, by the dual encoder and re-ranked with either score, three seeds each.

    jaxvl sweep --config=configs/sweeps/fusion.py --workdir=runs/fusion               reads emoji/train-*.tar, emoji/val-*.tar
    jaxvl sweep --config=configs/sweeps/fusion.py:all --workdir=runs/fusion_all       and TCL term by term, CODIS by its open choices
    jaxvl sweep --config=configs/sweeps/fusion.py:textbook --workdir=runs/textbook    the three methods on textbook/..., one seed

Each run is six minutes of one core, 1,800 steps. One evaluation gives all numbers: rerank/dual/... of the dual encoder, rerank/itm/... of the match logit
alone, rerank/i2t/... and rerank/t2i/... of its sum with cosine/τ. Items with an equal caption are right (rerank/grouped_by/caption: how many captions
there are), and chance_r@K is R@K of an order of chance.
"""

STEPS = 1_800
TRUNK = {
    "image.patch": 8, "image.width": 64, "image.depth": 2, "image.mlp_dim": 192, "data.image_size": 32, "text.width": 64, "text.mlp_dim": 192,
    "tokenizer.context_length": 12, "augment.views": 2, "train.batch_size": 64, "train.steps": STEPS, "checkpoint.every": STEPS,
    "evals.val.every": STEPS, "evals.rerank.every": STEPS, "evals.rerank.k_test": 32, "evals.rerank.score": "itm+itc",
}  # fmt: skip
ALBEF = {"config": "../tcl_small.py", "method.align": "cma"}
CODIS = {"config": "../codis_small.py", "method.codes": 128}
ROWS = {
    "ALBEF": ALBEF,
    "TCL": {**ALBEF, "method.align": "cma+imc+lmi"},
    "CODIS": CODIS,
    "CODIS, no codebook": {**CODIS, "method.code": False},
    "CODIS, K=512": {**CODIS, "method.codes": 512},
}
FURTHER = {
    "ALBEF + IMC": {**ALBEF, "method.align": "cma+imc"},
    "ALBEF + LMI": {**ALBEF, "method.align": "cma+lmi"},
    "CODIS, K=32": {**CODIS, "method.codes": 32},
    "CODIS, Sinkhorn": {**CODIS, "method.ot_solver": "sinkhorn"},
    "CODIS, local plans": {**CODIS, "method.ot_scope": "local", "method.ot_group": 16},
}


def sweep(which: str = "emoji") -> dict:
    choices = {"emoji": ROWS, "all": ROWS | FURTHER, "textbook": {name: ROWS[name] for name in ("ALBEF", "TCL", "CODIS")}}
    if which not in choices:
        raise ValueError(f"configs/sweeps/fusion.py:{which}: it takes {', '.join(choices)}")
    rows = choices[which]
    data = "textbook" if which == "textbook" else "emoji"
    here = {f"{key}.source": f"{data}/{part}-*.tar" for key, part in (("data", "train"), ("evals.val", "val"), ("evals.rerank", "val"))}
    numbers = [f"rerank/{score}{way}/r@{k}" for score in ("dual/", "itm/", "") for way in ("i2t", "t2i") for k in (1, 10)]
    chance = [f"rerank/{way}/chance_r@{k}" for way in ("i2t", "t2i") for k in (1, 10)]
    return dict(
        metric=numbers[0],
        also=(*numbers[1:], *chance, "rerank/grouped_by/caption"),
        rows={name: {**row, **TRUNK, **here} for name, row in rows.items()},
        seeds=(0,) if which == "textbook" else (0, 1, 2),
    )
