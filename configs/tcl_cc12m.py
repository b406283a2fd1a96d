"""TCL on Conceptual 12M: the recipe of tcl_4m with the errata of the published code put right, for 32 or more accelerators.

    jaxvl train --config=configs/tcl_cc12m.py --workdir=/runs/tcl_cc12m --config.data.source="/data/cc12m/{00000..01242}.tar"

No published run stands behind these numbers: batch and rate are four times those of tcl_4m, negatives come from the whole batch, and
the noise that queues start with counts for nothing.
"""

from ml_collections import ConfigDict
from tcl_4m import get_config as base

EPOCH = 5_400  # steps: 11 million pairs


def get_config() -> ConfigDict:
    config = base()
    config.method.update(profile="fixed", alpha_steps=EPOCH)
    config.data.update(source="/data/cc12m/{00000..01242}.tar", captions="first")
    config.optim.update(learning_rate=4e-4, epochs=20, warmup_across_epochs=True, decay=r"(kernel|embed|types|pos)$", clip_norm=1.0)
    config.train = dict(batch_size=2_048, steps=20 * EPOCH)
    config.checkpoint.keep_every = 5 * EPOCH
    config.evals.val.every = EPOCH
    return config
