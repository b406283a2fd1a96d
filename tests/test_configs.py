"""Every shipped recipe: its keys, its full size in shapes, and two shrunk steps, saved, resumed and compared bit for bit."""

from pathlib import Path
from types import SimpleNamespace

import jax
import numpy as np
import pytest
import transformers
from running import leaves, metrics

from jaxvl import assembly, config as configs, manifest, phases, train, words
from jaxvl.data import decode, lexicon
from jaxvl.data.dataset import decode_options
from jaxvl.interop import initial, published
from jaxvl.mesh import make_mesh
from jaxvl.methods import fused_options, tcl
from jaxvl.methods.method import Run
from jaxvl.models import kinds
from jaxvl.parts import assemble
from jaxvl.tiny import shrink

# Recipes that differ from another one in data, numbers and terms left out alone, so that shrunk they run the code of that one.
ALIKE = ("albef_4m", "clip_vitl14_cc12m", "codis_4m", "codis_cc12m", "hpl_cars196", "hpl_inshop", "hpl_small", "hpl_sop", "jvsm_fashioniq", "jvsm_utzap50k",
         "retrieval_flickr30k_ft", "tcl_4m", "tcl_cc12m")  # fmt: skip
# One of each method, in which the state of the run is of all shapes that it has there.
RESUMED = ("clip_vitb16_cc12m", "codis_small", "hpl_cub200", "jvsm_fashion200k", "lexvla_mini", "siglip_vitb16_cc12m", "tcl_small")
SAMPLES = {"hpl_cub200": 5_864, "hpl_cars196": 8_054, "hpl_sop": 59_551, "hpl_inshop": 25_882, "hpl_inaturalist": 325_846}
FILES = sorted((Path(__file__).parent.parent / "configs").glob("*.py"))


@pytest.mark.parametrize(
    "file",
    [*FILES, *(f"{FILES[0].parent}/hpl_{name}.py:resnet50" for name in ("cub200", "inshop"))],
    ids=lambda f: Path(f).stem + str(f).partition(":")[2],
)
def test_full_size_in_shapes(file):
    """Method, optimiser, path rules and the whole train step at full size, without an array; the run reaches all that it waits for."""
    config = configs.load(str(file))
    lexical = lexicon.Lexicon(np.arange(4, 4 + (config.method.get("entries") or 100)), (), {}) if config.tokenizer.lexicon else None
    prompt = lexicon.Prompt("{}", (4, 5), 2, 3) if config.tokenizer.prompt else None
    tokenizer = SimpleNamespace(
        vocab_size=config.tokenizer.vocab_size,
        context_length=config.tokenizer.context_length,
        eos=2,
        ends=True,
        mask=3,
        lexicon=lexical,
        prompt=prompt,
    )
    mesh = make_mesh(configs.read(config).mesh)
    with jax.set_mesh(mesh):
        recipe = configs.read(config)
        parts = assemble(
            recipe, None if recipe.data.captions == "none" else tokenizer, Run(classes=getattr(recipe.method, "classes", 0) or 452)
        )
        samples = SAMPLES.get(Path(file).stem, 10_000_000 if "cc12m" in str(file) else 10_000)
        phases.check(parts.method, parts.recipe.optim, recipe.train.steps or int(recipe.train.epochs * samples / recipe.train.batch_size))
        plan = assembly.program(parts, mesh, steps=10_000)
        state, metrics = jax.eval_shape(plan.step, plan.state, plan.batch)
    assert jax.tree.structure(state) == jax.tree.structure(plan.state)
    assert all(a.shape == b.shape and a.dtype == b.dtype for a, b in zip(jax.tree.leaves(state), jax.tree.leaves(plan.state), strict=True))
    assert metrics["loss"].shape == () and metrics["loss"].dtype == np.float32


@pytest.mark.parametrize("file", [f for f in FILES if f.stem not in ALIKE], ids=lambda f: f.stem)
def test_two_steps_resumed_bit_for_bit(file, tmp_path, capfd):
    """The run of two steps, and for RESUMED the same run that lost its last checkpoint and went on from the one before."""
    config = shrink(configs.load(str(file)))
    if file.stem == "hpl_cub200":
        config.method.coarse_mode = "free"  # an optimiser's state of all shapes as well
    run = tmp_path / "run"
    assert train.train(config, run) == 0
    logged, final = metrics(run), leaves(run, step=2)
    assert [row["step"] for row in logged if "loss" in row] == [1, 2]
    # A decoder that should have read, and here has no file to come from.
    told = "lets image, text, text_codebook stand still" in "".join(capfd.readouterr())
    assert told == (file.stem == "lexvla_cc12m")
    if file.stem not in RESUMED:
        return
    manifest.delete(run / "checkpoints", 2)
    assert train.train(config, run) == 0
    assert metrics(run) == logged
    again = leaves(run, step=2)
    assert final.keys() == again.keys()
    assert [name for name in final if final[name] != again[name]] == []
    if file.stem == "hpl_cub200":
        manifest.delete(run / "checkpoints", 2)
        config.method.hierarchy_start = 0
        before = (run / "config.json").read_bytes()
        with pytest.raises(ValueError, match="at step 1 without a hierarchy"):
            train.train(config, run)
        assert (run / "config.json").read_bytes() == before
    if file.stem == "lexvla_mini":
        page = words.run(run, [], images=3).read_text()
        assert page.count('class="card"') == 3 and "step</em> 2<" in page


@pytest.mark.parametrize("file", FILES, ids=lambda f: f.stem)
def test_every_recipe_cuts_at_random(file):
    """More than one part is seen of a photograph, upright or not, and of the square pictures that the small recipes are for."""
    data = configs.read(configs.load(str(file))).data
    for size in ((64, 64),) if file.stem.endswith(("small", "mini", "quickstart")) else ((640, 480), (480, 640)):
        boxes = {decode.random_box(*size, decode_options(data), np.random.default_rng(seed).random(decode.UNIFORMS)) for seed in range(40)}
        assert len(boxes) > 10, f"{size}: {boxes}"


# What papers of one family have of their own; all else of two recipes is the same.
VIEWS = {"augment.views", "augment.jitter", "augment.grayscale", "augment.blur"}
OWN = {
    ("tcl_4m", "albef_4m"): {"method.align", *VIEWS},
    ("albef_4m", "codis_4m"): {"method.name", "method.scope", "method.unfilled"},
    ("tcl_cc12m", "codis_cc12m"): {"method.name", "method.scope", "method.unfilled", *VIEWS},
    ("tcl_small", "codis_small"): {"method.name", "method.scope", "method.unfilled", "augment.views"},
    ("clip_quickstart", "siglip_quickstart"): {"method.name", "method.temperature"},
}
DATA = ("data.", "train.", "evals.", "checkpoint.", "mesh.", "log.")
SHARED = (("clip_vitb16_cc12m", "siglip_vitb16_cc12m"), ("clip_vitb16_cc12m", "clip_vitl14_cc12m"))


def different(one, other):
    """The keys that both of two recipes have, with different values."""
    one, other = (configs.flat(configs.load(f"configs/{name}.py").to_dict()) for name in (one, other))
    return {key for key in one.keys() & other.keys() if one[key] != other[key]}


def trunk_of(name):
    options = configs.read(configs.load(f"configs/{name}.py")).method
    return fused_options.of_method(tcl.resolve(options) if isinstance(options, tcl.TclOptions) else options)


@pytest.mark.parametrize(("one", "other"), OWN)
def test_recipes_of_a_family_differ_where_their_papers_do(one, other):
    assert different(one, other) == OWN[one, other]
    if "clip" not in one:
        assert trunk_of(one) == trunk_of(other)


@pytest.mark.parametrize(("one", "other"), SHARED)
def test_recipes_of_one_set_see_and_measure_the_same(one, other):
    assert {key for key in different(one, other) if key.startswith(DATA)} <= {"mesh.fsdp"}


PUBLISHED = {
    "deit-base": lambda: transformers.ViTConfig(),
    "bert-base": lambda: transformers.BertConfig(),
    "dinov2-base": lambda: transformers.Dinov2Config(image_size=518, patch_size=14),
    "dinov2-small": lambda: transformers.Dinov2Config(image_size=518, patch_size=14, hidden_size=384, num_attention_heads=6),
    "Llama-2-7b": lambda: transformers.LlamaConfig(rms_norm_eps=1e-5),
}
STARTS = {
    **{f"{name}_{data}": ("deit-base", "bert-base") for name in ("tcl", "codis") for data in ("4m", "cc12m")}, "albef_4m": ("deit-base", "bert-base"),
    "lexvla_cc12m": ("dinov2-base", "Llama-2-7b"), **{f"hpl_{name}": ("dinov2-small", "") for name in ("cub200", "cars196", "sop", "inshop", "inaturalist")},
}  # fmt: skip


@pytest.mark.parametrize("recipe", STARTS)
def test_recipes_start_from_the_models_that_they_name(recipe):
    """Nothing that changes what the weights compute differs from the published model but what config.init.differ names."""
    read = configs.read(configs.load(f"configs/{recipe}.py"))
    for name, model in zip(("image", "text"), STARTS[recipe], strict=True):
        if not model:
            continue
        theirs = getattr(published.describe(PUBLISHED[model]().to_dict(), {"mask_token", "cls.predictions.bias"}), name)
        ours = getattr(read, name)
        if name == "text":
            ours = ours._replace(vocab_size=ours.vocab_size or theirs.vocab_size)
            theirs = theirs._replace(depth=theirs.depth - getattr(read.method, "fusion_depth", 0))
        ours = kinds.of(ours).resolve(ours, name)
        assert initial._differences(name, model, ours, theirs, read.init.differ) == []
