"""Forward FLOPs of a tower from its options, a multiply-add counting two; what MFU is measured against.

Matrix products only, the whole attention matrix also where it is causal; XLA's own count cannot serve, since it takes the
body of a scan once. A training step is three times the forward pass, whatever is rematerialised.
"""

from jaxvl.models import lstm, mobilenet, resnet, text, vit
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


def lstm_flops(options: lstm.LstmOptions, length: int) -> float:
    """One text of `length` tokens, padding included."""
    o = options
    return 2.0 * (length * 4 * o.width * (o.word_dim + o.width) + o.width * o.head)


def resnet_flops(options: resnet.ResnetOptions, height: int, width: int) -> float:
    """One image of height x width pixels."""
    o = resnet.resolve(options)
    halve = lambda n: -(-n // 2)
    height, width = halve(height), halve(width)
    total, into = height * width * 7 * 7 * 3 * o.width, o.width
    height, width = halve(height), halve(width)
    for stage, blocks in enumerate(o.stages):
        inside = o.width * 2**stage
        out = inside * resnet.EXPANSION
        for block in range(blocks):
            before = height * width
            if stage and not block:
                height, width = halve(height), halve(width)
            area = height * width
            total += (
                before * into * inside + area * inside * (9 * inside + out) + (area * into * out if into != out or before != area else 0)
            )
            into = out
    return 2.0 * (total + into * o.head)


def mobilenet_flops(options: mobilenet.MobilenetOptions, height: int, width: int) -> float:
    """One image of height x width pixels."""
    o, halve = options, lambda n: -(-n // 2)
    height, width, into = halve(height), halve(width), mobilenet.channels(options, mobilenet.STEM)
    total = height * width * 9 * 3 * into
    for full, stride in mobilenet.BLOCKS:
        if stride == 2:
            height, width = halve(height), halve(width)
        out = mobilenet.channels(o, full)
        total += height * width * into * (9 + out)
        into = out
    return 2.0 * (total + into * o.head)
