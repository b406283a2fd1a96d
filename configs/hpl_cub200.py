"""HPL on CUB-200-2011, the first hundred birds for training and the others for testing (Kim et al. 2020 and Yang et al. 2022).

    jaxvl train --config=configs/hpl_cub200.py --workdir=/runs/hpl_cub
    jaxvl train --config=configs/hpl_cub200.py:resnet50 --workdir=/runs/hpl_cub_r50

The data are TFDS's, prepared with file_format="array_record"; a tree of folders that `jaxvl data make --layout=folders` wrote serves as well,
with data.label=class and data.hierarchy="re:([^_.]+)$". The recipe is that of the released Proxy-Anchor: AdamW with decay on everything, the proxies' rate a hundredfold, values
of the gradient cut at 10, an epoch in which only head and proxies train. Its backbone there is a BN-Inception; here it is DINOv2 ViT-S/14
or a ResNet-50 with frozen batch normalisation and the sum of average and maximum over space. `jaxvl import` brings the weights of
either to config.init.image, the latter's from the safetensors of torchvision or timm. --config.method.hierarchy=given takes the kind of
bird, the last word of a species' name, --config.method.hierarchy=none is Proxy-Anchor. A learned hierarchy has as many groups as the given
one, so that the two differ in what they group alone: what the paper took is not known.
"""

from ml_collections import ConfigDict

SPLITS = ("tfds://caltech_birds2011/train?image=image", "tfds://caltech_birds2011/test?image=image")
EPOCH = 48  # steps of 120 of the 5,864 images
KINDS = 48  # of the first hundred birds: albatrosses, anis, ..., orioles, ovenbirds, pelicans
WARM = {"dinov2": 1, "resnet50": 5}  # epochs of head and proxies alone

NORMS = r"^image/(.*/)?\w*norm\d*/(scale|bias|mean|var)$"  # of the ResNet; decay would move them
BACKBONES = {
    "dinov2": (dict(variant="S/14", layer_scale=1.0, head_bias=True), "/models/dinov2-small", ()),
    "resnet50": (dict(kind="resnet", depth=50, pool="avg+max", head_bias=True), "/models/resnet50", ((NORMS, 0.0),)),
}


def get_config(backbone: str = "dinov2") -> ConfigDict:
    image, weights, still = BACKBONES[backbone]
    config = ConfigDict()
    config.seed = 0
    config.method = dict(name="hpl", width=512, classes=100, hierarchy_start=20 * EPOCH, num_coarse=(KINDS,))
    config.image = image
    config.init = dict(image=weights)
    config.data = dict(
        source=SPLITS,
        captions="none",
        label="label",
        classes="first",
        hierarchy=r"label_name:re:([^_]+)$",
        levels=(0,),
        image_size=224,
        crop_scale=(0.08, 1.0),
    )
    config.augment = dict(mean=(0.485, 0.456, 0.406), std=(0.229, 0.224, 0.225), flip=0.5)
    config.optim = dict(learning_rate=1e-4, schedule="step", step_every=5 * EPOCH, step_factor=0.5, b2=0.999, eps=1e-8, weight_decay=1e-4, decay="",
                        groups=(*still, ("^(proxies|coarse)", 100.0)), hold=(("^image/(?!head)", WARM[backbone] * EPOCH),), clip_norm=0.0, clip_value=10.0)  # fmt: skip
    config.train = dict(batch_size=120, epochs=60.0)
    config.checkpoint = dict(every=10 * EPOCH)
    config.evals = dict(test=dict(kind="metric_learning", source=SPLITS, label="label", classes="second", ks=(1, 2, 4, 8), every=5 * EPOCH))
    return config
