"""Vision transformer (Dosovitskiy et al. 2021): ViT, DeiT, DINOv2 and the image towers of CLIP and SigLIP by options."""

from typing import Literal, NamedTuple, get_args

import flax.linen as nn
import jax
import jax.numpy as jnp

from jaxvl.models import parts
from jaxvl.models.tower import Tower, check_sizes, sized

Pool = Literal["cls", "mean", "map"]


class VitOptions(NamedTuple):
    """The keys of the `image` section. The image size is the data's: positions are as many as the patches seen at init."""

    variant: str = "B/16"  # SIZES name / patch side; "" where every size is given
    patch: int = 0  # sizes that are 0 are the variant's
    width: int = 0
    depth: int = 0
    heads: int = 0
    mlp_dim: int = 0
    pool: Pool = "cls"  # mean is over patches; map is attention pooling with a learned query
    class_tokens: int = 1  # 0: SigLIP; 2: DeiT's class and distillation tokens
    registers: int = 0  # DINOv2: tokens without a position between class token and patches
    mask_token: bool = False  # DINOv2: replaces the patches that `masked` marks
    patch_bias: bool = True
    pre_norm: bool = False  # CLIP: norm before the first block
    pooler: int = 0  # width of ViT's tanh(dense(pooled)); 0: none
    head: int = 0  # width of a final projection of the pooled state; 0: none
    head_bias: bool = False
    act: parts.Act = "gelu"
    gated: bool = False
    qkv_bias: bool = True
    layer_scale: float = 0.0
    eps: float = 1e-6
    patch_dropout: float = 0.0  # share of patches left out of a training pass (Li et al. 2023, FLIP)
    drop_remainder: bool = False  # ignore pixels beyond the last whole patch instead of refusing the image
    dropout: float = 0.0
    attention_dropout: float = 0.0
    drop_path: float = 0.0  # share of the samples of a batch that skip a branch (stochastic depth)
    init_std: float = 0.0
    scan: bool = True
    remat: parts.Remat = "none"
    attention: parts.Kernel = "auto"
    dtype: parts.Dtype = "bfloat16"
    kind: Literal["vit"] = "vit"


def resolve(options: VitOptions, section: str = "image") -> VitOptions:
    """Options with every size filled in and every value checked. Raises ValueError naming key, value and remedy."""
    if options.kind != "vit":
        raise ValueError(f"config.{section}.kind is {options.kind!r}, but what is asked for takes a 'vit'")
    check_sizes(options, section)
    size, _, patch = options.variant.partition("/")
    if options.variant and not (patch.isdigit() or options.patch):
        raise ValueError(f'{section}.variant={options.variant!r} has no patch size: write it as "B/16"')
    o = sized(options, size, section)
    o = o._replace(patch=o.patch or int(patch or 0), variant="")
    if o.patch < 1:
        raise ValueError(f"{section}.patch={o.patch} must be at least 1 where no variant is given")
    if o.pool not in get_args(Pool):
        raise ValueError(f"{section}.pool={o.pool!r} is none of {', '.join(get_args(Pool))}")
    if o.class_tokens not in (0, 1, 2):
        raise ValueError(f"{section}.class_tokens={o.class_tokens} is none of 0, 1, 2")
    if o.pool == "cls" and not o.class_tokens:
        raise ValueError(f"{section}.pool='cls' needs {section}.class_tokens of at least 1")
    if not 0 <= o.patch_dropout < 1:
        raise ValueError(f"{section}.patch_dropout={o.patch_dropout} is not in [0, 1)")
    parts.check_block(block_options(o), section)
    return o


def block_options(o: VitOptions) -> parts.BlockOptions:
    shared = set(parts.BlockOptions._fields) & set(VitOptions._fields)
    return parts.BlockOptions(**{key: getattr(o, key) for key in shared})


def grid(o: VitOptions, height: int, width: int) -> tuple[int, int]:
    """Rows and columns of patches of an image. Raises ValueError where the patch does not divide the image."""
    if ((height % o.patch or width % o.patch) and not o.drop_remainder) or min(height, width) < o.patch:
        raise ValueError(f"images of {height} x {width} pixels do not divide into patches of {o.patch} x {o.patch}")
    return height // o.patch, width // o.patch


class Vit(nn.Module):
    """images float [batch, height, width, 3] -> Tower; `options` may still name a variant."""

    options: VitOptions

    @nn.compact
    def __call__(self, images, masked=None, *, hidden: bool = False) -> Tower:
        """masked: bool [batch, patch], patches to replace by the mask token. hidden: return every layer's output."""
        o = resolve(self.options)
        block = block_options(o)
        dtype = jnp.dtype(o.dtype)
        small = nn.initializers.normal(o.init_std or o.width**-0.5)
        token = lambda name, rows: self.param(name, small, (rows, o.width), jnp.float32).astype(dtype)
        batch, height, width, channels = images.shape
        rows, columns = grid(o, height, width)

        # A convolution whose stride is its kernel is one matrix product over flattened patches.
        x = images[:, : rows * o.patch, : columns * o.patch].astype(dtype)
        x = x.reshape(batch, rows, o.patch, columns, o.patch, channels)
        lecun = nn.initializers.lecun_normal()
        patches = nn.DenseGeneral(o.width, (2, 4, 5), use_bias=o.patch_bias, dtype=dtype, kernel_init=lecun, name="patch")
        x = patches(x).reshape(batch, rows * columns, o.width)
        if o.mask_token:
            mask_token = token("mask_token", 1)
            x = x if masked is None else jnp.where(masked[..., None], mask_token, x)
        elif masked is not None:
            raise ValueError("masked patches need image.mask_token=True")

        wanted = o.class_tokens + rows * columns
        have = self.get_variable("params", "pos").shape[0] if self.has_variable("params", "pos") else wanted
        if have != wanted:
            raise ValueError(
                f"{rows} x {columns} patches and {o.class_tokens} class tokens need {wanted} positions, the parameters have "
                f"{have}: resize them for images of {height} x {width} pixels"
            )
        positions = token("pos", wanted)
        x = x + positions[o.class_tokens :]
        if o.patch_dropout and self.has_rng("dropout"):
            x = keep_patches(self.make_rng("dropout"), x, 1 - o.patch_dropout)
        front = []
        for index, name in enumerate(("cls", "distill")[: o.class_tokens]):
            front.append(token(name, 1) + positions[index : index + 1])
        if o.registers:
            front.append(token("registers", o.registers))
        x = jnp.concatenate([*(jnp.broadcast_to(t, (batch, *t.shape)) for t in front), x], axis=1)
        x = nn.Dropout(o.dropout)(x, deterministic=not self.has_rng("dropout"))
        if o.pre_norm:
            x = parts.norm(block, "pre_norm")(x)

        embedded = x = parts.batch_sharded(x)  # [batch, class + registers + patch, width]
        x, layers = parts.stack(block, "blocks", hidden=hidden)(x, parts.Context(), None, None)
        tokens = parts.norm(block, "norm")(x)
        pooled = {"cls": lambda: tokens[:, 0], "mean": lambda: tokens[:, o.class_tokens + o.registers :].mean(1),
                  "map": lambda: parts.MapPool(block, name="map")(tokens)}[o.pool]()  # fmt: skip
        pooled = project(o, block, pooled)
        return Tower(pooled, tokens, jnp.concatenate([embedded[None], layers.hidden]) if hidden else None)


def project(o, block: parts.BlockOptions, pooled: jax.Array) -> jax.Array:
    """The pooler and the head of a tower, where its options have them; float32 [batch, head or width]."""
    init = nn.initializers.normal(o.init_std or o.width**-0.5)
    dtype = jnp.dtype(block.dtype)
    if o.pooler:
        pooled = jnp.tanh(nn.Dense(o.pooler, dtype=dtype, kernel_init=init, name="pooler")(pooled))
    if o.head:
        pooled = nn.Dense(o.head, use_bias=o.head_bias, dtype=dtype, kernel_init=init, name="head")(pooled)
    return pooled.astype(jnp.float32)


def keep_patches(key: jax.Array, x: jax.Array, share: float) -> jax.Array:
    """A random `share` of the patches of each image, at least one, in order; [batch, patch, width]."""
    kept = max(1, round(share * x.shape[1]))
    order = jnp.argsort(jax.random.uniform(key, x.shape[:2]), axis=1)[:, :kept]
    return jnp.take_along_axis(x, jnp.sort(order, axis=1)[..., None], axis=1)
