"""MobileNet v1 (Howard et al. 2017, https://arxiv.org/abs/1704.04861, table 1): depthwise separable convolutions."""

from typing import Literal, NamedTuple, get_args

import flax.linen as nn
import jax.numpy as jnp

from jaxvl.models import parts
from jaxvl.models.batch_norm import BatchNorm, Statistics
from jaxvl.models.resnet import Pool, convolution, pool
from jaxvl.models.tower import Tower, check_sizes

STEM = 32
BLOCKS = ((64, 1), (128, 2), (128, 1), (256, 2), (256, 1), (512, 2), *((512, 1),) * 5, (1024, 2), (1024, 1))  # channels, stride
LEVELS = (6, 10, 13)  # blocks, from 1, whose maps VAL composes (Chen, Gong and Bazzani, CVPR 2020)


class MobilenetOptions(NamedTuple):
    """The keys of the `image` section where its kind is "mobilenet"."""

    kind: Literal["mobilenet"] = "mobilenet"
    multiplier: float = 1.0  # of all channels
    pool: Pool = "avg"
    statistics: Statistics = "frozen"  # of BatchNorm; frozen ones, and their affine maps, stand still
    eps: float = 1e-5  # 1e-3 in TensorFlow's weights
    padding: Literal["even", "same"] = "even"  # of strided convolutions: one pixel on every side, or TensorFlow's, more on the right
    head: int = 0  # width of a final projection of the pooled state; 0: none
    head_bias: bool = False
    dtype: parts.Dtype = "bfloat16"


def resolve(options: MobilenetOptions, section: str = "image") -> MobilenetOptions:
    """The options, checked. Raises ValueError naming key, value and remedy."""
    check_sizes(options, section)
    o = options
    if channels(o, STEM) < 1:
        raise ValueError(f"{section}.multiplier={o.multiplier} leaves no channel of {STEM}; it must be at least {1 / STEM}")
    for key, legal in (("pool", Pool), ("statistics", Statistics), ("padding", Literal["even", "same"]), ("dtype", parts.Dtype)):
        if getattr(o, key) not in get_args(legal):
            raise ValueError(f"{section}.{key}={getattr(o, key)!r} is none of {', '.join(get_args(legal))}")
    return o


def channels(o: MobilenetOptions, full: int) -> int:
    return int(full * o.multiplier)


def features(o: MobilenetOptions) -> int:
    """Channels of the pooled state before the head."""
    return channels(o, BLOCKS[-1][0])


class Mobilenet(nn.Module):
    """images float [batch, height, width, 3] -> Tower, its tokens the last map [batch, height * width, channel]."""

    options: MobilenetOptions

    @nn.compact
    def __call__(self, images, valid=None, *, train: bool = False, maps: bool = False) -> Tower:
        """train: take the statistics of the batch, where options.statistics is "batch", of its rows `valid`, bool [batch]. maps: return those of the blocks LEVELS."""
        o = resolve(self.options)

        def layer(x, name: str, features: int, kernel: int, stride: int, groups: int = 1):
            conv = convolution(o, features, kernel, stride, name, groups)
            if o.padding == "same":
                conv = conv.clone(padding="SAME")
            x = BatchNorm(o.eps, statistics=o.statistics, name=f"{name}_norm")(conv(x), valid, train=train)
            return nn.relu6(x)

        x = layer(images.astype(jnp.dtype(o.dtype)), "stem", channels(o, STEM), 3, 2)
        levels = []
        for number, (full, stride) in enumerate(BLOCKS, 1):
            x = layer(x, f"depthwise{number}", x.shape[-1], 3, stride, x.shape[-1])
            x = parts.batch_sharded(layer(x, f"pointwise{number}", channels(o, full), 1, 1))
            if number in LEVELS:
                levels.append(x)
        pooled = pool(o.pool, x)
        if o.head:
            pooled = nn.Dense(o.head, use_bias=o.head_bias, dtype=jnp.dtype(o.dtype), name="head")(pooled)
        tokens = x.reshape(x.shape[0], -1, x.shape[-1])
        return Tower(pooled.astype(jnp.float32), tokens, maps=tuple(levels) if maps else None)
