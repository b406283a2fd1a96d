"""What the methods of the ALBEF family have to choose in common (`fused.py`), and which choices cannot be."""

from typing import Any, Literal, NamedTuple, get_args

from jaxvl.models.text import TextOptions
from jaxvl.models.vit import VitOptions

LOW, HIGH = 0.001, 0.5  # bounds of the temperature


class TrunkOptions(NamedTuple):
    """What the trunk needs of a method's options, under the same names.

    width: channels of the joint space. fusion_depth: fusion layers; they are like those of the `text` section. temperature: where it starts.
    queue: entries of each queue. momentum: of the teacher. alpha, alpha_steps: weight of the teacher in the targets and the
    steps in which it rises to that from 0. unfilled: whether queue entries that nothing was written to yet count as negatives
    ("contrast") or not ("mask"). scope, group_size: whether in-batch negatives come from groups of `group_size` consecutive
    rows, as on the devices of the published runs, or from the whole batch. ids: images have ids ("id" int32 [B] in the batch); those
    of one id are positives of each other. mlm: whether words are predicted; mlm_rate, mlm_cap: share that is hidden, and at most how many of
    a caption, 0 for any number. mlm_distill_axis: see `losses/mlm.py`. chunks: parts in which the teacher and the fusion layers go
    through the batch.
    """

    width: int
    fusion_depth: int
    temperature: float
    queue: int
    momentum: float
    alpha: float
    alpha_steps: int
    unfilled: Literal["contrast", "mask"]
    scope: Literal["group", "global"]
    group_size: int
    ids: bool
    mlm: bool
    mlm_rate: float
    mlm_cap: int
    mlm_distill_axis: Literal["vocab", "seq_legacy"]
    chunks: int


def of_method(options: Any) -> TrunkOptions:
    """The trunk's share of a method's options."""
    return TrunkOptions(**{key: getattr(options, key) for key in TrunkOptions._fields})


def check(image: VitOptions, text: TextOptions, o: TrunkOptions) -> None:
    """Raises ValueError naming the key, its value and what would be right."""
    for key, low in (("width", 1), ("fusion_depth", 1), ("queue", 1), ("group_size", 1), ("chunks", 1), ("alpha_steps", 0), ("mlm_cap", 0)):
        if getattr(o, key) < low:
            raise ValueError(f"config.method.{key} is {getattr(o, key)}; it must be at least {low}")
    for key, high in (("momentum", 1), ("alpha", 1), ("mlm_rate", 1)):
        if not 0 <= getattr(o, key) <= high:
            raise ValueError(f"config.method.{key} is {getattr(o, key)}; it must be in [0, {high}]")
    if not LOW <= o.temperature <= HIGH:
        raise ValueError(f"config.method.temperature is {o.temperature}; it must be in [{LOW}, {HIGH}], where it is kept")
    for key in ("unfilled", "scope", "mlm_distill_axis"):
        legal = get_args(TrunkOptions.__annotations__[key])
        if getattr(o, key) not in legal:
            raise ValueError(f"config.method.{key} is {getattr(o, key)!r}; it must be one of {', '.join(map(repr, legal))}")
    for section, tower, pool in (("image", image, "cls"), ("text", text, "first")):
        if tower.pool != pool:
            raise ValueError(f"config.{section}.pool is {tower.pool!r}; fusion models read the class token, which is {pool!r}")
        if tower.head or tower.pooler:
            raise ValueError(
                f"config.{section} has a head of {tower.head} and a pooler of {tower.pooler} channels; fusion models project to config.method.width, so both must be 0"
            )
    if text.causal:
        raise ValueError("config.text.causal is True; the text layers of fusion models see the whole caption: set it to False")
    if o.mlm and not text.mask_id:
        raise ValueError("config.text.mask_id is 0 and the tokenizer has no mask token: name the id of one, or set config.method.mlm=False")
