"""ResNet (He et al., CVPR 2016) with bottleneck blocks whose stride is in the 3 x 3 convolution, as torchvision and timm have it."""

from typing import Literal, NamedTuple, get_args

import flax.linen as nn
import jax
import jax.numpy as jnp

from jaxvl.models import parts
from jaxvl.models.batch_norm import BatchNorm, Statistics
from jaxvl.models.tower import Tower, check_sizes

DEPTHS = {50: (3, 4, 6, 3), 101: (3, 4, 23, 3), 152: (3, 8, 36, 3)}
EXPANSION = 4
Pool = Literal["avg", "max", "avg+max"]


class ResnetOptions(NamedTuple):
    """The keys of the `image` section where its kind is "resnet"."""

    kind: Literal["resnet"] = "resnet"
    depth: int = 50  # 50, 101 or 152; 0 where stages is given
    stages: tuple[int, ...] = ()  # blocks of each stage
    width: int = 64  # channels of the stem; stage i has width * 2^i inside and four times that on its way out
    pool: Pool = "avg"  # over space; avg+max adds the two, as metric learning has it
    statistics: Statistics = "frozen"  # of BatchNorm; frozen ones, and their affine maps, stand still
    eps: float = 1e-5
    head: int = 0  # width of a final projection of the pooled state; 0: none
    head_bias: bool = False
    dtype: parts.Dtype = "bfloat16"


def resolve(options: ResnetOptions, section: str = "image") -> ResnetOptions:
    """Options with the stages filled in, checked. Raises ValueError naming key, value and remedy."""
    check_sizes(options, section)
    o = options
    if o.depth and o.depth not in DEPTHS:
        raise ValueError(f"{section}.depth={o.depth} is none of {', '.join(map(str, DEPTHS))}; set it to 0 and give {section}.stages")
    if o.depth and o.stages not in ((), DEPTHS[o.depth]):
        raise ValueError(f"{section}.stages={o.stages} are not those of depth {o.depth}; set {section}.depth=0 or leave stages empty")
    o = o._replace(stages=o.stages or DEPTHS.get(o.depth, ()), depth=0)
    if not o.stages or min(o.stages) < 1 or o.width < 1:
        raise ValueError(f"{section}: stages={o.stages} and width={o.width}; there must be a stage, and all must be at least 1")
    for key, legal in (("pool", Pool), ("statistics", Statistics), ("dtype", parts.Dtype)):
        if getattr(o, key) not in get_args(legal):
            raise ValueError(f"{section}.{key}={getattr(o, key)!r} is none of {', '.join(get_args(legal))}")
    return o


def features(o: ResnetOptions) -> int:
    """Channels of the pooled state before the head."""
    return o.width * 2 ** (len(resolve(o).stages) - 1) * EXPANSION


def convolution(o, features: int, kernel: int, stride: int, name: str, groups: int = 1) -> nn.Conv:
    """A convolution without bias that pads every side by half its kernel."""
    pad = [(kernel // 2, kernel // 2)] * 2
    init = nn.initializers.variance_scaling(2.0, "fan_out", "normal")
    return nn.Conv(
        features,
        (kernel, kernel),
        (stride, stride),
        pad,
        feature_group_count=groups,
        use_bias=False,
        dtype=jnp.dtype(o.dtype),
        kernel_init=init,
        name=name,
    )


class Bottleneck(nn.Module):
    """x [batch, height, width, any] -> [batch, height / stride, width / stride, 4 * width]."""

    options: ResnetOptions
    width: int
    stride: int

    @nn.compact
    def __call__(self, x, valid, train):
        o = self.options
        norm = lambda name: BatchNorm(o.eps, statistics=o.statistics, name=name)
        y = nn.relu(norm("norm1")(convolution(o, self.width, 1, 1, "conv1")(x), valid, train=train))
        y = nn.relu(norm("norm2")(convolution(o, self.width, 3, self.stride, "conv2")(y), valid, train=train))
        y = norm("norm3")(convolution(o, self.width * EXPANSION, 1, 1, "conv3")(y), valid, train=train)
        if x.shape[-1] != y.shape[-1] or self.stride > 1:
            x = norm("shortcut_norm")(convolution(o, self.width * EXPANSION, 1, self.stride, "shortcut")(x), valid, train=train)
        return parts.batch_sharded(nn.relu(x + y))


class Resnet(nn.Module):
    """images float [batch, height, width, 3] -> Tower, its tokens the last map [batch, height * width, channel]."""

    options: ResnetOptions

    @nn.compact
    def __call__(self, images, valid=None, *, train: bool = False, maps: bool = False) -> Tower:
        """train: take the statistics of the batch, where options.statistics is "batch", of its rows `valid`, bool [batch]. maps: return those of the last three stages."""
        o = resolve(self.options)
        x = images.astype(jnp.dtype(o.dtype))
        x = nn.relu(
            BatchNorm(o.eps, statistics=o.statistics, name="stem_norm")(convolution(o, o.width, 7, 2, "stem")(x), valid, train=train)
        )
        x = nn.max_pool(x, (3, 3), (2, 2), ((1, 1), (1, 1)))
        levels = []
        for stage, blocks in enumerate(o.stages):
            for block in range(blocks):
                stride = 2 if stage and not block else 1
                x = Bottleneck(o, o.width * 2**stage, stride, name=f"stage{stage + 1}_{block}")(x, valid, train)
            levels.append(x)
        pooled = pool(o.pool, x)
        if o.head:
            pooled = nn.Dense(o.head, use_bias=o.head_bias, dtype=jnp.dtype(o.dtype), name="head")(pooled)
        tokens = x.reshape(x.shape[0], -1, x.shape[-1])
        return Tower(pooled.astype(jnp.float32), tokens, maps=tuple(levels[-3:]) if maps else None)


def pool(how: str, x: jax.Array) -> jax.Array:
    """[batch, height, width, channel] -> [batch, channel] in float32."""
    x = x.astype(jnp.float32)
    return {"avg": lambda: x.mean((1, 2)), "max": lambda: x.max((1, 2)), "avg+max": lambda: x.mean((1, 2)) + x.max((1, 2))}[how]()
