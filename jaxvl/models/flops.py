"""Forward FLOPs of a tower from its options, a multiply-add counting two; what MFU is measured against.

Matrix products only, the whole attention matrix also where it is causal; XLA's own count cannot serve, since it takes the
body of a scan once. A training step is three times the forward pass, whatever is rematerialised.
"""
from jaxvl.models import text, vit
from jaxvl.models.parts import BlockOptions


def _attention(o: BlockOptions, queries: int, keys: int, source: int) -> float:
    inner, inner_keys = o.heads * o.head_width, o.key_heads * o.head_width
    linear = queries * o.width * inner * 2 + keys * source * inner_keys * 2
    return 2.0 * (linear + 2 * queries * keys * inner)


def _mlp(o: BlockOptions, tokens: int) -> float:
    return 2.0 * tokens * o.width * o.mlp_dim * (3 if o.gated else 2)


def block_flops(o: BlockOptions, tokens: int, context: int = 0, context_width: int = 0) -> float:
    """One block on one sequence, cross-attending `context` tokens of `context_width` where its options say so."""
    cross = _attention(o, tokens, context, context_width or o.width) if o.cross else 0.0
    return _attention(o, tokens, tokens, o.width) + cross + _mlp(o, tokens)


def _pooled(o: vit.VitOptions | text.TextOptions, block: BlockOptions, tokens: int) -> float:
    pool = _attention(block, 1, tokens, o.width) + _mlp(block, 1) if o.pool == "map" else 0.0
    return pool + 2.0 * (o.width * o.pooler + (o.pooler or o.width) * o.head)


def vit_flops(options: vit.VitOptions, height: int, width: int, *, train: bool = False) -> float:
    """One image of height x width pixels; `train` counts the patches that patch dropout leaves."""
    o = vit.resolve(options)
    block = vit.block_options(o)
    rows, columns = vit.grid(o, height, width)
    patches = rows * columns
    embed = 2.0 * patches * o.patch**2 * 3 * o.width
    kept = max(1, round((1 - o.patch_dropout) * patches)) if train and o.patch_dropout else patches
    tokens = kept + o.class_tokens + o.registers
    return embed + o.depth * block_flops(block, tokens) + _pooled(o, block, tokens)


def text_flops(options: text.TextOptions, length: int) -> float:
    """One caption of `length` tokens, padding included."""
    o = text.resolve(options)
    block = text.block_options(o)
    return o.depth * block_flops(block, length) + _pooled(o, block, length)
