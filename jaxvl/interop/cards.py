"""README.md of an exported folder, and how a client is told to prepare images and captions as the run did."""

import json
from typing import Any

import jax

from jaxvl.data.dataset import Style
from jaxvl.data.text import Cleaning
from jaxvl.secrets import public

PIPELINE = 64  # tokens to which transformers' zero-shot pipeline pads the labels of a SiglipModel
FIT = {"crop": "its largest centred square of whole pixels", "squash": "the whole of it, its shape given up"}
STYLE = {
    "plain": "each run of white space and invisible characters becomes one space, none at the ends",
    "albef": "as plain, then lower case, without punctuation, hyphens and slashes as spaces, the first {words} words",
}


def image_processor(recipe: Any) -> dict[str, Any]:
    """preprocessor_config.json: the evaluation's own square of whole pixels, antialiased bicubic, mean and deviation.

    Perceiver's processor, since it alone cuts the square before it resizes; after it, the long side's rounded length
    moves the square (1 - cos of up to 9e-3 for a tall image).
    """
    square = {"height": recipe.data.image_size, "width": recipe.data.image_size}
    return {"image_processor_type": "PerceiverImageProcessor", "do_center_crop": recipe.data.fit == "crop", "crop_size": square, "do_resize": True, "size": square,
            "resample": 3, "do_rescale": True, "rescale_factor": 1 / 255, "do_normalize": True, "image_mean": list(recipe.augment.mean),
            "image_std": list(recipe.augment.std), "do_convert_rgb": True}  # fmt: skip


def cleaning(recipe: Any) -> Cleaning:
    """How the captions of a run are cleaned; what all its sources have in common, where they differ."""
    styles = _styles(recipe)
    return Cleaning(styles.pop() if len(styles) == 1 else "plain", recipe.data.max_words)


def _styles(recipe: Any) -> set[Style]:
    styles: Style | tuple[Style, ...] = recipe.data.cleaning
    return set((styles,) if isinstance(styles, str) else styles)


def transformers(model: Any, architecture: str) -> str:
    """The model card of a folder that transformers opens; model: an `export.Model`."""
    recipe, siglip = model.recipe, architecture == "SiglipModel"
    towers = [name for name in ("image", "text") if getattr(recipe.init, name)]
    start = ", ".join(f"{name} tower from {getattr(recipe.init, name)}" for name in towers) or "random numbers"
    length = model.tokenizer.context_length
    pads = (
        "as this model needs"
        if length == PIPELINE
        else "which this model refuses"
        if length < PIPELINE
        else "too few for this model (up to 0.07)"
    )
    limits = [
        *_limits(model),
        _OPENED,
        _WHOLE.format(length=length, pipeline=pads, pads=PIPELINE) if siglip else _LONG.format(length=length),
    ]
    return _CARD.format(
        architecture=architecture, method=recipe.method.name, step=model.step, batch=recipe.train.batch_size, source=public(str(recipe.data.source)), start=start,
        pad='"max_length"' if siglip else "True", size=recipe.data.image_size, length=length, preparation=_preparation(model), limits=_lines(limits), captions=_in_prompt(model),
        count=f"{sum(x.size for x in jax.tree.leaves(model.params)):,}",
    )  # fmt: skip


def programs(model: Any, kind: str) -> str:
    """README.md of a folder with image.KIND and text.KIND; kind: stablehlo or onnx."""
    title, what, code = {
        "stablehlo": (
            "StableHLO",
            "on cpu, cuda and tpu. Each takes some tensors of `model.safetensors`, which it names.",
            _STABLEHLO,
        ),
        "onnx": ("ONNX", "with the parameters inside.", _ONNX),
    }[kind]
    return _PROGRAMS.format(
        title=title, kind=kind, what=what, code=code.replace("CAPTIONS", _in_prompt(model)), size=model.recipe.data.image_size,
        length=model.tokenizer.context_length, preparation=_preparation(model), limits=_lines(_limits(model)),
    )  # fmt: skip


def _preparation(model: Any) -> str:
    recipe, how = model.recipe, cleaning(model.recipe)
    rows = [
        ("image", "upright as its EXIF orientation says, transparency on white, RGB of 8 bits"),
        ("part", FIT[recipe.data.fit]),
        ("size", f"{recipe.data.image_size} x {recipe.data.image_size} pixels, antialiased bicubic, rounded to whole levels"),
        ("values", f"(level / 255 - mean) / std, mean {list(recipe.augment.mean)}, std {list(recipe.augment.std)}"),
        ("caption", STYLE[how.style].format(words=how.words)),
        ("tokens", f"{model.tokenizer.context_length} at most; a long caption loses its end; padding is 0"),
    ]
    if model.tokenizer.prompt:
        rows.append(("prompt", f"`{json.dumps(model.tokenizer.prompt.template, ensure_ascii=False)}`"))
    return "\n".join(f"| {name} | {what} |" for name, what in rows)


def _in_prompt(model: Any) -> str:
    """The expression of the captions in the card's code: as they come, or in the prompt of the training."""
    if not model.tokenizer.prompt:
        return "captions"
    return f"[{model.tokenizer.prompt.template!r}.replace('{{}}', ' '.join(caption.split())) for caption in captions]"


def _limits(model: Any) -> list[str]:
    """What neither files nor code can make a client do, with its size."""
    lines = [_UPRIGHT, _DEEP, _SPECIAL]
    if model.tokenizer.prompt:
        lines.append("A caption that is too long for its prompt loses its own end in training, and here the end of the prompt.")
    if len(_styles(model.recipe)) > 1:
        lines.append("The sources of the training cleaned captions in different ways; the tokenizer does what is common to all.")
    return lines


def _lines(limits: list[str]) -> str:
    return "\n".join(f"- {line}" for line in limits)


# Sizes are 1 - cos between embeddings, measured on small models with random weights: `jaxvl bench clients`.
_UPRIGHT = "A picture that is opened without `exif_transpose` stays as it is stored: where EXIF turns it, 1 - cos is up to 0.2."
_DEEP = "Pillow clips 16 bits a pixel where they should be scaled to 8 (up to 0.8): divide by 257 before."
_SPECIAL = "The text of a special token in a caption, such as `<eos>`, may be read in another way (up to 0.8)."
_OPENED = (
    "Given a path instead of an opened picture, and in the zero-shot pipeline always, transparency is dropped and not put on white (up to 0.7); "
    "from a path the torchvision processor turns only JPEG and PNG upright, and reads no BMP, TIFF, AVIF or JPEG 2000."
)
_LONG = "A caption longer than {length} tokens is refused where truncation is not asked for; the zero-shot pipeline never asks."
_WHOLE = (
    "Captions must be padded to {length} tokens, as above, and as `AutoProcessor` does where it is told nothing, for the model reads padding: "
    "with `padding=True` or none 1 - cos is up to 1. The zero-shot pipeline pads to {pads} whatever it is told, {pipeline}."
)

_CARD = """---
library_name: transformers
tags: [jaxvl, {method}, vision-language]
---
# {architecture} trained with jaxvl

| | |
|---|---|
| method | {method} |
| parameters | {count} |
| started from | {start} |
| trained on | `{source}` |
| training | {step} steps of {batch} pairs |

```python
from PIL import Image, ImageOps
from transformers import AutoModel, AutoProcessor

model, processor = AutoModel.from_pretrained(folder).eval(), AutoProcessor.from_pretrained(folder)
images = [ImageOps.exif_transpose(Image.open(path)) for path in paths]
inputs = processor(images=images, text={captions}, padding={pad}, truncation=True, max_length={length}, return_tensors="pt")
out = model(**inputs)
similarity = out.text_embeds @ out.image_embeds.T
```

## How images and captions were prepared

`preprocessor_config.json` and `tokenizer.json` do the same with files opened as above and with captions as they come.

| | |
|---|---|
{preparation}

What remains, as 1 - cos between embeddings of small models:

{limits}
"""

_PROGRAMS = """# Embedding functions as {title}

`image.{kind}` maps float32 [batch, {size}, {size}, 3] (normalised pixels), `text.{kind}` int32 [batch, {length}] (token ids) to float32
embeddings of unit norm, for any batch, {what}

```python
{code}
```

## How images and captions were prepared

`preprocessor_config.json` and `tokenizer/` do it with files opened as above and with captions as they come.

| | |
|---|---|
{preparation}

What remains, as 1 - cos between embeddings of small models:

{limits}
"""

_INPUTS = """from PIL import Image, ImageOps
from transformers import AutoImageProcessor, AutoTokenizer

processor, tokenizer = AutoImageProcessor.from_pretrained(folder), AutoTokenizer.from_pretrained(folder + "/tokenizer")
images = [ImageOps.exif_transpose(Image.open(path)) for path in paths]
pixels = np.moveaxis(np.asarray(processor(images, return_tensors="np")["pixel_values"]), 1, -1)
tokens = tokenizer(CAPTIONS, padding="max_length", truncation=True, return_tensors="np")["input_ids"].astype(np.int32)"""

_STABLEHLO = f"""import jax
import numpy as np
{_INPUTS}

from safetensors.numpy import load_file

params = load_file(folder + "/model.safetensors")

def embed(name, inputs):
    program = jax.export.deserialize(bytearray(open(f"{{folder}}/{{name}}.stablehlo", "rb").read()))
    (named, _), _ = jax.tree.unflatten(program.in_tree, program.in_avals)
    return program.call({{k: params[k] for k in named}}, inputs)

similarity = embed("text", tokens) @ embed("image", pixels).T"""

_ONNX = f"""import numpy as np
import onnxruntime
{_INPUTS}

def embed(name, inputs):
    return onnxruntime.InferenceSession(f"{{folder}}/{{name}}.onnx").run(["embedding"], {{"input": inputs}})[0]

similarity = embed("text", tokens) @ embed("image", pixels).T"""
