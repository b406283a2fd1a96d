"""What an image tower and a text tower have in common: named sizes, and what a forward pass returns."""

from typing import Any, NamedTuple

import jax

# Sizes of the vision transformer papers: Dosovitskiy et al. 2021 (S from DeiT), Zhai et al. 2022 (g, G), SigLIP (So).
# "M" is the text tower of CLIP B/32 and B/16.
SIZES = {
    "Ti": {"width": 192, "depth": 12, "heads": 3, "mlp_dim": 768},
    "S": {"width": 384, "depth": 12, "heads": 6, "mlp_dim": 1536},
    "M": {"width": 512, "depth": 12, "heads": 8, "mlp_dim": 2048},
    "B": {"width": 768, "depth": 12, "heads": 12, "mlp_dim": 3072},
    "L": {"width": 1024, "depth": 24, "heads": 16, "mlp_dim": 4096},
    "So": {"width": 1152, "depth": 27, "heads": 16, "mlp_dim": 4304},
    "H": {"width": 1280, "depth": 32, "heads": 16, "mlp_dim": 5120},
    "g": {"width": 1408, "depth": 40, "heads": 16, "mlp_dim": 6144},
    "G": {"width": 1664, "depth": 48, "heads": 16, "mlp_dim": 8192},
}


class Tower(NamedTuple):
    """A forward pass. Fields that were not asked for are None."""

    pooled: jax.Array | None  # float32 [batch, head or width]
    tokens: jax.Array  # [batch, token, width], after the final norm, in the compute dtype
    hidden: jax.Array | None = None  # [depth + 1, batch, token, width]: the embedding, then each layer
    keys_values: tuple[jax.Array, jax.Array] | None = None  # each [depth, batch, token, kv_head, head_width]
    maps: tuple[jax.Array, ...] | None = None  # of a convolutional tower, finest first, each [batch, height, width, channel]


def sized(options: Any, variant: str, section: str) -> Any:
    """Options with the sizes that are 0 taken from SIZES[variant].

    An empty variant leaves the options alone. Raises ValueError for a variant that does not exist, or of which nothing is left.
    """
    if not variant:
        return options
    if variant not in SIZES:
        raise ValueError(f"{section}.variant={options.variant!r}: size {variant!r} is none of {', '.join(SIZES)}")
    given = {key: getattr(options, key) for key in SIZES[variant]}
    if all(given.values()) and given != SIZES[variant]:
        sizes = ", ".join(f"{key} {value}" for key, value in given.items())
        raise ValueError(
            f"config.{section}.variant is {options.variant!r}, and every size is given as another one ({sizes}): leave out one or the other; no variant is ''"
        )
    return options._replace(**{key: value for key, value in SIZES[variant].items() if not getattr(options, key)})


def check_sizes(options: Any, section: str) -> None:
    """Raises ValueError for a number of a tower's options that is negative: each is a size, a count or an id, and 0 says that there is none."""
    for key, value in options._asdict().items():
        if isinstance(value, int) and value < 0:
            raise ValueError(f"config.{section}.{key} is {value}; it must be 0 or more")
