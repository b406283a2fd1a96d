"""Convolutional towers in the files of torchvision and timm: told by their tensors, since such files come without a config that says."""

import re
from collections.abc import Mapping
from typing import Any

from jaxvl.interop.keys import ConfigError, section
from jaxvl.interop.names import CONV, Layout, Name
from jaxvl.interop.published import Published
from jaxvl.models import mobilenet
from jaxvl.models.mobilenet import MobilenetOptions
from jaxvl.models.resnet import ResnetOptions

HEADS = (r"^fc\.", r"^classifier\.")  # of the classes of the pre-training
UNREAD = (r"num_batches_tracked$", *HEADS)
# Where the 13 blocks of MobileNet v1 are in timm: stage and place.
PLACES = [(stage, i) for stage, count in enumerate((1, 2, 2, 6, 2)) for i in range(count)]


def holds(stored: Mapping[str, Any]) -> bool:
    """Whether these tensors are one of the two."""
    return "layer1.0.conv1.weight" in stored or ("conv_stem.weight" in stored and "blocks.0.0.conv_pw.weight" in stored)


def describe(stored: Mapping[str, Any]) -> Published:
    """The model of these tensors. Raises ConfigError for a ResNet of basic blocks."""
    if "conv_stem.weight" in stored:
        return Published(
            "mobilenet", image=MobilenetOptions(multiplier=stored["conv_stem.weight"].shape[0] / mobilenet.STEM), image_size=224
        )
    if "layer1.0.conv3.weight" not in stored:
        raise ConfigError(
            "the files hold a ResNet of basic blocks (18 or 34 layers); only bottleneck blocks (50, 101, 152) can be computed"
        )
    blocks = [re.match(r"layer(\d+)\.(\d+)\.conv1\.weight$", name) for name in stored]
    found = [(int(m[1]), int(m[2])) for m in blocks if m]
    stages = tuple(1 + max(i for stage, i in found if stage == s) for s in range(1, 1 + max(stage for stage, _ in found)))
    return Published("resnet", image=ResnetOptions(depth=0, stages=stages, width=stored["conv1.weight"].shape[0]), image_size=224)


def check(config: dict[str, Any], model: Published) -> None:
    """Raises ConfigError where a config.json beside the files tells of another network, or of one whose tensors do not show how it differs."""
    name = section("timm", config)["architecture"]
    if name and not re.fullmatch(r"(tv_)?resnet(50|101|152)|mobilenetv1_\d+", name):
        raise ConfigError(
            f"architecture={name!r}: only resnet50, resnet101, resnet152 and mobilenetv1_100 can be computed, not this {model.family}"
        )


def layout(model: Published) -> Layout:
    """The names of a model that `describe` has told."""
    names = _resnet(model.image.stages) if model.family == "resnet" else _mobilenet()
    return Layout(tuple(names), unread=UNREAD)


def _unit(ours: str, conv: str, norm: str, ours_norm: str) -> list[Name]:
    """A convolution and the normalisation behind it."""
    leaves = (("scale", "weight"), ("bias", "bias"), ("mean", "running_mean"), ("var", "running_var"))
    return [Name(f"image/{ours}/kernel", f"{conv}.weight", CONV), *(Name(f"image/{ours_norm}/{a}", f"{norm}.{b}") for a, b in leaves)]


def _resnet(stages: tuple[int, ...]) -> list[Name]:
    names = _unit("stem", "conv1", "bn1", "stem_norm")
    for stage, count in enumerate(stages, 1):
        for block in range(count):
            ours, theirs = f"stage{stage}_{block}", f"layer{stage}.{block}"
            for i in (1, 2, 3):
                names += _unit(f"{ours}/conv{i}", f"{theirs}.conv{i}", f"{theirs}.bn{i}", f"{ours}/norm{i}")
            names += _unit(f"{ours}/shortcut", f"{theirs}.downsample.0", f"{theirs}.downsample.1", f"{ours}/shortcut_norm")
    return names


def _mobilenet() -> list[Name]:
    names = _unit("stem", "conv_stem", "bn1", "stem_norm")
    for number, (stage, i) in enumerate(PLACES, 1):
        for ours, theirs, norm in (("depthwise", "conv_dw", "bn1"), ("pointwise", "conv_pw", "bn2")):
            names += _unit(f"{ours}{number}", f"blocks.{stage}.{i}.{theirs}", f"blocks.{stage}.{i}.{norm}", f"{ours}{number}_norm")
    return names
