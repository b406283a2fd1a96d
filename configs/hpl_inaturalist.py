"""HPL on the retrieval split of iNaturalist 2018: 5,690 species for training, 2,452 others for testing.

    for part in train test; do jaxvl data make /data/inat2018 --layout=inaturalist --part=$part --out=/data/inat2018-$part; done
    jaxvl train --config=configs/hpl_inaturalist.py --workdir=/runs/hpl_inat

With categories.json in the folder, --config.method.hierarchy=given with --config.method.num_coarse="(0, 0)" takes family and order above
the species, as many as the file names; more levels are more entries of data.levels, method.num_coarse and method.level_weights. A learned
one has √5,690 groups, and the root of that above them; to compare the two, give it the numbers that the other found.
"""

from hpl_sop import get_config as sop
from ml_collections import ConfigDict

EPOCH = 2_715  # steps of 120 of the 325,846 images


def get_config(backbone: str = "dinov2") -> ConfigDict:
    config = sop(backbone)
    config.method.update(classes=5_690, hierarchy_start=10 * EPOCH, num_coarse=(75, 9), level_weights=(1.0, 0.1, 0.1))
    config.data.update(source=("/data/inat2018-train",), label="class", hierarchy="hierarchy", levels=(4, 3))
    config.optim.update(step_every=7 * EPOCH, hold=(("^image/(?!head)", EPOCH),))
    config.train.update(epochs=20.0)
    config.checkpoint.update(every=EPOCH)
    config.evals = dict(test=dict(kind="metric_learning", source="/data/inat2018-test", ks=(1, 4, 16, 32), nmi="none", every=5 * EPOCH))
    return config
