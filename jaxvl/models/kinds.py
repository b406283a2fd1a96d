"""Towers by kind: the one place that knows which module, check and count belong to the options of an `image` or `text` section."""

from collections.abc import Callable
from typing import Any, NamedTuple

import flax.linen as nn

from jaxvl.models import flops, lstm, mobilenet, resnet, text, vit


class Kind(NamedTuple):
    """options: the tuple whose fields are the keys of the section. resolve: (options, section) -> options, checked and completed.

    module: (resolved options) -> Linen module, inputs -> Tower. features: (resolved options) -> channels of the pooled state before
    a head. flops: of images (options, height, width, train), of texts (options, length), for one forward pass of one of them.
    """

    options: type
    resolve: Callable[..., Any]
    module: Callable[..., nn.Module]
    features: Callable[[Any], int]
    flops: Callable[..., float]


IMAGE = {
    "vit": Kind(
        vit.VitOptions, vit.resolve, vit.Vit, lambda o: o.pooler or o.width, lambda o, h, w, train: flops.vit_flops(o, h, w, train=train)
    ),
    "resnet": Kind(resnet.ResnetOptions, resnet.resolve, resnet.Resnet, resnet.features, lambda o, h, w, _: flops.resnet_flops(o, h, w)),
    "mobilenet": Kind(
        mobilenet.MobilenetOptions,
        mobilenet.resolve,
        mobilenet.Mobilenet,
        mobilenet.features,
        lambda o, h, w, _: flops.mobilenet_flops(o, h, w),
    ),
}
TEXT = {
    "transformer": Kind(text.TextOptions, text.resolve, text.Text, lambda o: o.pooler or o.width, flops.text_flops),
    "lstm": Kind(lstm.LstmOptions, lstm.resolve, lstm.Lstm, lambda o: o.width, flops.lstm_flops),
}
KINDS = {"image": IMAGE, "text": TEXT}


def of(options: Any) -> Kind:
    """The kind of a tower's options."""
    return {**IMAGE, **TEXT}[options.kind]


def row_wise(options: Any, section: str = "image") -> None:
    """Raises ValueError where a tower's output for a row depends on other rows, for methods that keep no running statistics."""
    if getattr(options, "statistics", "frozen") != "frozen":
        raise ValueError(
            f"config.{section}.statistics is {options.statistics!r}, whose running averages this method does not keep; it must be 'frozen'"
        )


def constant(options: Any, section: str = "image") -> str:
    """Pattern of a tower's parameters that stand still, the statistics and affine maps of frozen batch normalisation; "" for none. They have
    no gradient, but an optimiser's decay would move them."""
    return rf"^{section}/(.*/)?\w*norm\d*/(scale|bias|mean|var)$" if getattr(options, "statistics", "") == "frozen" else ""
