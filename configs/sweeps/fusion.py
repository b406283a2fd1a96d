"""ALBEF, TCL term by term and CODIS by its open choices, on one small trunk from scratch, three seeds each.

    jaxvl sweep --config=configs/sweeps/fusion.py --workdir=runs/fusion               reads emoji/train-*.tar, emoji/val-*.tar
    jaxvl sweep --config=configs/sweeps/fusion.py:textbook --workdir=runs/textbook    the three methods on textbook/..., one seed

An hour of one core for the first; each run is two minutes.
"""

TRUNK = {
    "image.patch": 8, "image.width": 64, "image.depth": 2, "image.mlp_dim": 192, "data.image_size": 32, "text.width": 64, "text.mlp_dim": 192,
    "tokenizer.context_length": 12, "augment.views": 2, "train.batch_size": 64, "train.steps": 600, "checkpoint.every": 600,
    "evals.val.every": 600, "evals.rerank.every": 600, "evals.rerank.k_test": 32,
}  # fmt: skip
ALBEF = {"config": "../tcl_small.py", "method.align": "cma"}
CODIS = {"config": "../codis_small.py", "method.codes": 128}


def sweep(data: str = "emoji") -> dict:
    rows = {
        "ALBEF": ALBEF,
        "ALBEF + IMC": {**ALBEF, "method.align": "cma+imc"},
        "ALBEF + LMI": {**ALBEF, "method.align": "cma+lmi"},
        "TCL": {**ALBEF, "method.align": "cma+imc+lmi"},
        "CODIS": CODIS,
        "CODIS, no codebook": {**CODIS, "method.code": False},
        "CODIS, K=32": {**CODIS, "method.codes": 32},
        "CODIS, K=512": {**CODIS, "method.codes": 512},
        "CODIS, Sinkhorn": {**CODIS, "method.ot_solver": "sinkhorn"},
        "CODIS, local plans": {**CODIS, "method.ot_scope": "local", "method.ot_group": 16},
    }
    if data != "emoji":
        rows = {name: rows[name] for name in ("ALBEF", "TCL", "CODIS")}
    here = {f"{key}.source": f"{data}/{part}-*.tar" for key, part in (("data", "train"), ("evals.val", "val"), ("evals.rerank", "val"))}
    return dict(
        metric="rerank/dual/i2t/r@1",
        also=(
            "rerank/dual/i2t/r@10",
            "rerank/dual/t2i/r@1",
            "rerank/dual/t2i/r@10",
            "rerank/i2t/r@1",
            "rerank/i2t/r@10",
            "rerank/t2i/r@1",
            "rerank/t2i/r@10",
        ),
        rows={name: {**row, **TRUNK, **here} for name, row in rows.items()},
        seeds=(0, 1, 2) if data == "emoji" else (0,),
    )
