"""Where each parameter of the encoders lives on the mesh: ordered (path pattern, PartitionSpec), first match wins.

`tensor` splits the maps inside a layer the Megatron way: by output column on the way in (q, k, v, up, gate), by input row on
the way out (out, down), so a block needs one reduction per branch. `fsdp` splits the other side of every matrix. Vectors of
one width (norms, biases on the residual stream, single tokens) stay whole: gathering them would cost more than holding them.
A pattern is searched for at the end of the path, so the same rules place optimiser moments ("opt_state/0/mu/image/...") and
averaged copies. No pattern matches everything: a parameter nobody thought of is an error in `mesh.shardings`.
"""

from jax.sharding import PartitionSpec as P

_START = r"(?:^|/)"

# Inside `blocks` every leaf has a leading layer axis, which is scanned over and never split.
RULES: tuple[tuple[str, P], ...] = (
    (_START + r"blocks/(?:attn|cross)/[qkv]/kernel$", P(None, "fsdp", "tensor")),
    (_START + r"blocks/(?:attn|cross)/[qkv]/bias$", P(None, "tensor")),
    (_START + r"blocks/(?:attn|cross)/out/kernel$", P(None, "tensor", "fsdp")),
    (_START + r"blocks/mlp/(?:up|gate)/kernel$", P(None, "fsdp", "tensor")),
    (_START + r"blocks/mlp/(?:up|gate)/bias$", P(None, "tensor")),
    (_START + r"blocks/mlp/down/kernel$", P(None, "tensor", "fsdp")),
    (_START + r"blocks/(?:attn/out|cross/out|mlp/down)/bias$", P()),
    (_START + r"blocks/(?:attn|cross|mlp)_norm/(?:scale|bias)$", P()),
    (_START + r"blocks/(?:attn|cross|mlp)_scale$", P()),
    (_START + r"map/attn/[qkv]/kernel$", P("fsdp", "tensor")),
    (_START + r"map/attn/[qkv]/bias$", P("tensor")),
    (_START + r"map/attn/out/kernel$", P("tensor", "fsdp")),
    (_START + r"map/mlp/up/kernel$", P("fsdp", "tensor")),
    (_START + r"map/mlp/gate/kernel$", P("fsdp", "tensor")),
    (_START + r"map/mlp/(?:up|gate)/bias$", P("tensor")),
    (_START + r"map/mlp/down/kernel$", P("tensor", "fsdp")),
    (_START + r"map/(?:attn/out|mlp/down)/bias$", P()),
    (_START + r"map/norm/(?:scale|bias)$", P()),
    (_START + r"map/probe$", P()),
    (_START + r"patch/kernel$", P(None, None, None, "fsdp")),
    (_START + r"patch/bias$", P()),
    # By width, since vocabularies rarely divide.
    (_START + r"embed$", P(None, ("fsdp", "tensor"))),
    (_START + r"types$", P(None, "fsdp")),
    (_START + r"pos$", P(None, "fsdp")),
    (_START + r"(?:cls|distill|registers|mask_token)$", P()),
    (_START + r"(?:norm|pre_norm|embed_norm)/(?:scale|bias)$", P()),
    # Convolutional towers, whose every map of normalisation is named ...norm or ...norm1.
    (_START + r"(?:stem|shortcut|conv\d|depthwise\d+|pointwise\d+)/kernel$", P(None, None, None, "fsdp")),
    (_START + r"(?:\w+_)?norm\d?/(?:scale|bias|mean|var)$", P()),
    (_START + r"lstm_(?:in|hidden)$", P("fsdp", None)),
    (_START + r"(?:lstm_bias|start_hidden|start_cell)$", P()),
    # Compositions and joint projections.
    (_START + r"compose/(?:\w+/)?spatial_gate/kernel$", P()),
    (_START + r"(?:compose|joint)/(?:\w+/)?\w+/kernel$", P("fsdp", None)),
    (_START + r"(?:compose|joint)/(?:\w+/)?(?:\w+/bias|a|r|w)$", P()),
    (_START + r"(?:pooler|head|mlm/transform)/kernel$", P("fsdp", None)),
    (_START + r"(?:pooler|head|mlm/transform)/bias$", P()),
    (_START + r"(?:lm_head|mlm/decoder)/kernel$", P(("fsdp", "tensor"), None)),
    (_START + r"mlm/(?:bias|spare_bias)$", P()),
)
