"""HPL on In-Shop clothes retrieval: 3,997 garments for training, 3,985 others as queries against a gallery of their own.

    for part in train query gallery; do jaxvl data make /data/inshop --layout=inshop --part=$part --out=/data/inshop-$part; done
    jaxvl train --config=configs/hpl_inshop.py --workdir=/runs/hpl_inshop

A given hierarchy is the category of the garment, men's and women's apart: --config.method.hierarchy=given with
--config.method.num_coarse="(0,)", as many as the lists name. A learned one has √3,997 groups, of some sixty garments each; to compare the
two, give it the number that the other found.
"""

from hpl_sop import get_config as sop
from ml_collections import ConfigDict

EPOCH = 215  # steps of 120 of the 25,882 images


def get_config(backbone: str = "dinov2") -> ConfigDict:
    config = sop(backbone)
    config.method.update(classes=3_997, hierarchy_start=30 * EPOCH, num_coarse=(63,))
    config.data.update(source=("/data/inshop-train",), label="class", hierarchy="hierarchy", levels=(1,))
    config.optim.update(step_every=20 * EPOCH, hold=(("^image/(?!head)", EPOCH),))
    config.checkpoint.update(every=5 * EPOCH)
    config.evals = dict(
        test=dict(
            kind="metric_learning",
            source="/data/inshop-query",
            gallery="/data/inshop-gallery",
            ks=(1, 10, 20, 30, 40, 50),
            nmi="none",
            every=10 * EPOCH,
        )
    )
    return config
