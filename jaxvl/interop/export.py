"""`jaxvl export`: a run's model as other programs load it, and the measured difference between theirs and ours.

hf           CLIPModel, SiglipModel or VisionTextDualEncoderModel: AutoModel.from_pretrained(OUT)
safetensors  our own names and layout, with the run's config
stablehlo    both embedding functions for cpu, cuda and tpu, batch size open; parameters beside them
onnx         both embedding functions with their parameters, batch size open
albef        TCL and ALBEF as their own code names them, teacher and queues included: one file of tensors
peft         the adapters of a run with LoRA, for the published models it started from: PeftModel.from_pretrained(base, OUT)
"""

import importlib.util
import json
from collections.abc import Callable
from pathlib import Path
from typing import Any, NamedTuple

import flax.traverse_util
import jax
import jax.numpy as jnp
import numpy as np

from jaxvl.interop import albef, cards, exported, hugging_face, importing, load, onnx, peft, tensors
from jaxvl.interop.vocabulary import Given, write_tokenizer
from jaxvl.mesh import path_str
from jaxvl.methods import METHODS
from jaxvl.models import lora, text as texts, vit as vits
from jaxvl.new_files import new_folder
from jaxvl.optim import frozen
from jaxvl.progress import say
from jaxvl.secrets import public_tree
from jaxvl.terminal import tell

FACES = ("image", "text")
TOLERANCE = {"float32": 1e-4, "bfloat16": 3e-2}  # of embeddings of unit norm
ROWS = 4  # of the random input; a batch size that no program was made for
PLATFORMS = ("cpu", "cuda", "tpu")


class Model(NamedTuple):
    """What is exported. params: numpy, adapters merged; state: as the run holds them. ours: (images, tokens) -> embeddings, by
    the run's own method and parameters; plain: the same method without adapters."""

    recipe: Any
    tokenizer: Any
    plain: Any
    params: dict[str, Any]
    state: dict[str, Any]
    ours: Callable[[np.ndarray, np.ndarray], tuple[np.ndarray, np.ndarray]]
    step: int
    memory: Any = None  # of the method, where the format has a place for it

    @property
    def dtype(self) -> str:
        return "float32" if self.recipe.image.dtype == self.recipe.text.dtype == "float32" else "bfloat16"


def run(parts: Any, found: Any, kind: str, out: Path, memory: Any = None) -> int:
    """Export the method of `parts` with the parameters `found` (checkpoint.Restored) and its memory into the new folder `out`.

    Prints the largest difference between embeddings of the exported model and of ours on random input. `out` appears when it
    is whole and within tolerance; raises ValueError where it is not, or where the run cannot be written in this format.
    """
    if parts.tokenizer is None:
        raise ValueError(
            f"the method {parts.recipe.method.name} reads no captions, and what is exported embeds images and captions: use the run itself"
        )
    with new_folder(out) as partial:
        model = _model(parts, found)._replace(memory=memory)
        with jax.default_matmul_precision("highest"):
            measured = WRITERS[kind](model, partial)
            for reader, difference in measured.items():
                say(f"{kind} read by {reader}: embeddings differ by at most {difference:.2e} (tolerance {TOLERANCE[model.dtype]:.0e})")
        if not all(difference <= TOLERANCE[model.dtype] for difference in measured.values()):
            raise ValueError(
                f"the exported model differs from ours by more than {TOLERANCE[model.dtype]:.0e}: {measured}; nothing is written"
            )
        partial.rename(out)
    tell(str(out))
    return 0


def _model(parts: Any, found: Any) -> Model:
    recipe, params = parts.recipe, found.state
    faces = jax.jit(lambda p, images, tokens: (parts.method.embed_image(p, images), parts.method.embed_text(p, tokens)))
    plain = METHODS[recipe.method.name].build(recipe.image, recipe.text, recipe.method)
    merged = lora.merge(params, recipe.lora) if recipe.lora.rank else params

    def ours(images: np.ndarray, tokens: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
        image, text = faces(params, images, tokens)
        return np.asarray(image), np.asarray(text)

    return Model(recipe, parts.tokenizer, plain, hugging_face.as_numpy(merged), params, ours, found.step)


def random_input(model: Model) -> tuple[np.ndarray, np.ndarray]:
    """Images float32 [ROWS, S, S, 3] and captions int32 [ROWS, L] of every length: random ids, an end of text, padding."""
    rng = np.random.default_rng(0)
    size, length = model.recipe.data.image_size, model.tokenizer.context_length
    images = rng.standard_normal((ROWS, size, size, 3)).astype(np.float32)
    tokens = rng.integers(1, model.tokenizer.vocab_size, (ROWS, length)).astype(np.int32)
    tokens[tokens == model.tokenizer.eos] = 1 if model.tokenizer.eos != 1 else 2
    for row, end in enumerate(np.linspace(1, length - 1, ROWS).astype(int)):
        tokens[row, end], tokens[row, end + 1 :] = model.tokenizer.eos, 0
    return images, tokens


def _difference(one: tuple[Any, Any], other: tuple[Any, Any]) -> float:
    return max(float(np.max(np.abs(np.asarray(a, np.float64) - np.asarray(b, np.float64)))) for a, b in zip(one, other, strict=True))


def _hf(model: Model, folder: Path) -> dict[str, float]:
    recipe = model.recipe
    what = hugging_face.target(recipe.method, recipe.image, recipe.text, model.params, recipe.data.image_size)
    siglip = what.architecture == "SiglipModel"  # its attention reads padding, so captions must come whole and without a mask
    hugging_face.write(folder, what, "float32")
    _json(folder / "config.json", {"architectures": [what.architecture], "dtype": "float32", **what.config})
    given = Given(cards.cleaning(recipe), ("input_ids",) if siglip else ("input_ids", "attention_mask"), siglip)
    _json(folder / "preprocessor_config.json", cards.image_processor(recipe))
    write_tokenizer(model.tokenizer, folder, what.ids, given)
    (folder / "README.md").write_text(cards.transformers(model, what.architecture))
    images, tokens = random_input(model)
    ours, theirs = model.ours(images, tokens), tokens if what.ids is None else what.ids[tokens]
    faces = hugging_face.open_folder(folder)
    measured = {"our importer": _difference(ours, (faces.embed_image(images), faces.embed_text(jnp.asarray(theirs))))}
    try:
        import torch  # noqa: F401
    except ImportError:
        say("torch is not installed, so the folder is not loaded in transformers here")
    else:
        mask = None if siglip else tokens != 0
        measured["transformers"] = _difference(ours, hugging_face.embeddings_in_torch(folder, images, theirs, mask))
    return measured


def _safetensors(model: Model, folder: Path) -> dict[str, float]:
    _write_params(model, folder)
    model.tokenizer.save(folder / "tokenizer")
    config = public_tree(_sections(model.recipe))
    _json(folder / "config.json", {"format": "jaxvl", "step": model.step, "config": config, exported.KEY: exported.sealed(config, folder)})
    params = flax.traverse_util.unflatten_dict({k: tensors.read(v) for k, v in tensors.find(folder).items()}, sep="/")
    return {"safetensors": _of_plain(model, params)}


def _stablehlo(model: Model, folder: Path) -> dict[str, float]:
    """{image,text}.stablehlo: serialised jax.export programs of ({name: array}, inputs) -> embeddings float32 [batch, width].

    Which names is in the program's own in_tree."""
    if importlib.util.find_spec("flatbuffers") is None:
        raise ValueError("flatbuffers is not installed, in which jax.export writes programs: pip install flatbuffers")
    _write_params(model, folder)
    images, tokens = random_input(model)
    (batch,) = jax.export.symbolic_shape("batch")
    stored = {path: tensors.read(tensor) for path, tensor in tensors.find(folder).items()}
    made = []
    for name, inputs in (("image", images), ("text", tokens)):
        face, read = _face(model, name, inputs)
        shapes = {path: jax.ShapeDtypeStruct(x.shape, x.dtype) for path, x in read.items()}
        program = jax.export.export(jax.jit(face), platforms=PLATFORMS)(
            shapes, jax.ShapeDtypeStruct((batch, *inputs.shape[1:]), inputs.dtype)
        )
        (folder / f"{name}.stablehlo").write_bytes(program.serialize())
        whole = jax.export.deserialize(bytearray((folder / f"{name}.stablehlo").read_bytes()))
        made.append(whole.call({path: stored[path] for path in read}, inputs))
    _preparation(model, folder)
    (folder / "README.md").write_text(cards.programs(model, "stablehlo"))
    return {"jax.export": _difference(model.ours(images, tokens), tuple(made))}


def _onnx(model: Model, folder: Path) -> dict[str, float]:
    """{image,text}.onnx: inputs -> embeddings float32 [batch, width]."""
    onnx.check_installed()
    images, tokens = random_input(model)
    made = [
        onnx.write(folder / f"{name}.onnx", *_face(model, name, inputs), inputs) for name, inputs in (("image", images), ("text", tokens))
    ]
    _preparation(model, folder)
    (folder / "README.md").write_text(cards.programs(model, "onnx"))
    return {"onnxruntime": _difference(model.ours(images, tokens), (made[0](images), made[1](tokens)))}


def _face(model: Model, name: str, inputs: np.ndarray) -> tuple[Callable[[dict[str, Any], Any], jax.Array], dict[str, np.ndarray]]:
    """An embedding function of flat parameters, and those that it takes: its tower's, and what it reads besides, such as projections and adapters."""
    plain: Any = model.plain
    face, flat = getattr(plain, f"embed_{name}"), _flat(model.params)
    whole = lambda params, x: face(flax.traverse_util.unflatten_dict({**flat, **params}, sep="/"), x)
    traced = jax.make_jaxpr(whole)(flat, inputs).jaxpr
    read = {id(v) for equation in traced.eqns for v in equation.invars} | {id(v) for v in traced.outvars}
    taken = zip(sorted(flat), traced.invars, strict=False)  # the last is the inputs
    return whole, {path: flat[path] for path, v in taken if id(v) in read or path.startswith(name + "/")}


def _preparation(model: Model, folder: Path) -> None:
    """preprocessor_config.json and tokenizer/ of programs that take our ids, padded to their full length."""
    _json(folder / "preprocessor_config.json", cards.image_processor(model.recipe))
    write_tokenizer(model.tokenizer, folder / "tokenizer", None, Given(cards.cleaning(model.recipe), ("input_ids",), whole=True))


def _albef(model: Model, folder: Path) -> dict[str, float]:
    recipe, file = model.recipe, folder / tensors.SINGLE
    if model.memory is None:
        raise ValueError("a checkpoint of ALBEF holds the teacher and the queues, and only parameters are here")
    memory = jax.tree.map(np.asarray, model.memory) if model.memory else {}  # its places and ids stay whole numbers
    published, tree = albef.of_run(model.params, memory, vits.resolve(recipe.image), texts.resolve(recipe.text), recipe.data.image_size)
    load.save(file, published, tree)
    model.tokenizer.save(folder / "tokenizer")
    params, _ = albef.split(load.fill(published, tensors.find(file)).params)
    return {"our importer": _of_plain(model, params)}


def _peft(model: Model, folder: Path) -> dict[str, float]:
    """Adapters of one published model lie in `folder` itself; of two, in its folders image and text."""
    recipe = model.recipe
    if not recipe.lora.rank:
        raise ValueError("config.lora.rank is 0: this run has no adapters to write; hf and safetensors hold whole models")
    adapters = _flat(hugging_face.as_numpy(model.state["lora"]))
    towers = [name for name in FACES if any(path.startswith(name + "/") for path in adapters)]
    for name in towers:
        start = getattr(recipe.init, name)
        if not start or not (Path(start) / importing.FILE).is_file():
            raise ValueError(
                f"adapters belong to a published model: config.init.{name} is {start!r}, no folder of `jaxvl import`; hf and safetensors merge them"
            )
    bases = {name: getattr(recipe.init, name) for name in towers}
    read: dict[str, np.ndarray] = {}
    starts = dict.fromkeys(bases.values())  # in the order of the towers, so that the same fault is told first every time
    for start in starts:
        mine = [name for name in towers if bases[name] == start]
        target = folder if len(starts) == 1 else folder / mine[0]
        target.mkdir(exist_ok=True)
        origin = importing.read(start)
        peft.write(
            target,
            {path: value for path, value in adapters.items() if path.startswith(tuple(name + "/" for name in mine))},
            recipe.lora,
            origin.model,
            origin.source,
        )
        read |= peft.read(target, origin.model, recipe.lora)
    still = jax.tree_util.tree_leaves_with_path(frozen(recipe.optim, model.state))
    if trained := [path_str(path) for path, fixed in still if fixed is not True and not path_str(path).startswith("lora/")]:
        say(f"trained as well, and no part of an adapter folder: {', '.join(trained)}")
    merged = lora.merge({**model.state, "lora": flax.traverse_util.unflatten_dict(read, sep="/")}, recipe.lora)
    return {"our PEFT reader": _of_plain(model, merged)}


WRITERS: dict[str, Callable[[Model, Path], dict[str, float]]] = {
    "hf": _hf,
    "safetensors": _safetensors,
    "stablehlo": _stablehlo,
    "onnx": _onnx,
    "albef": _albef,
    "peft": _peft,
}


def _flat(params: dict[str, Any]) -> dict[str, np.ndarray]:
    return flax.traverse_util.flatten_dict(params, sep="/")


def _write_params(model: Model, folder: Path) -> None:
    flat = _flat(model.params)
    tensors.write(folder / tensors.SINGLE, {path: (x.shape, x.dtype) for path, x in flat.items()}, flat.items())


def _of_plain(model: Model, params: dict[str, Any]) -> float:
    """Difference of ours from the method without adapters on `params`."""
    plain: Any = model.plain
    faces = jax.jit(lambda p, images, tokens: (plain.embed_image(p, images), plain.embed_text(p, tokens)))
    images, tokens = random_input(model)
    return _difference(model.ours(images, tokens), faces(params, images, tokens))


def _sections(recipe: Any) -> dict[str, Any]:
    fields = lambda x: x._asdict() if hasattr(x, "_asdict") else x
    return {k: _sections(v) if isinstance(fields(v), dict) else v for k, v in fields(recipe).items()}


def _json(path: Path, content: dict[str, Any]) -> None:
    path.write_text(json.dumps(content, indent=2) + "\n")
