"""CODIS from scratch on a few thousand pairs: emoji, textbook figures, glyphs, or a folder of your own; otherwise as tcl_small.

    jaxvl train --config=configs/codis_small.py --workdir=runs/codis                      reads emoji/train-*.tar, emoji/val-*.tar
    jaxvl train --config=configs/codis_small.py:textbook --workdir=runs/codis_textbook    reads textbook/...
    jaxvl train --config=configs/codis_small.py:glyphs --workdir=runs/codis_glyphs        the embedded set

What the paper leaves open is one override each: --config.method.codes=256, --config.method.ot_solver=sinkhorn,
--config.method.ot_scope=local, --config.method.code_temperature=0 (the learned one), --config.method.ipot_iterations=200,
--config.method.ica_intra=hard, --config.method.code=False (no codebook). Data elsewhere: --config.data.source="mine/train-*.tar" and
--config.evals.val.source="mine/val-*.tar", --config.evals.rerank.source likewise.
"""

from ml_collections import ConfigDict
from tcl_small import get_config as base


def get_config(data: str = "emoji") -> ConfigDict:
    config = base(data)
    config.method = dict(name="codis", width=64, fusion_depth=1, codes=128, queue=1_024, momentum=0.98, alpha_steps=100,
                         unfilled="mask", scope="global", ot_group=32, mlm_cap=4)  # fmt: skip
    config.augment.views = 1
    return config
