"""Every shipped recipe: its keys, its full size in shapes, and two shrunk steps, saved, resumed and compared bit for bit."""

from pathlib import Path
from types import SimpleNamespace

import jax
import numpy as np
import pytest
from running import leaves, metrics

from jaxvl import assembly, config as configs, manifest, train, words
from jaxvl.data import decode, lexicon
from jaxvl.data.dataset import decode_options
from jaxvl.mesh import make_mesh
from jaxvl.methods.method import Run
from jaxvl.parts import assemble
from jaxvl.tiny import shrink

# Recipes that differ from another one in data, numbers and terms left out alone, so that shrunk they run the code of that one.
ALIKE = ("albef_4m", "clip_vitl14_cc12m", "codis_4m", "codis_cc12m", "hpl_cars196", "hpl_inshop", "hpl_small", "hpl_sop", "jvsm_fashioniq", "jvsm_utzap50k",
         "retrieval_flickr30k_ft", "tcl_4m", "tcl_cc12m")  # fmt: skip
# One of each method, in which the state of the run is of all shapes that it has there.
RESUMED = ("clip_vitb16_cc12m", "codis_small", "hpl_cub200", "jvsm_fashion200k", "lexvla_mini", "siglip_vitb16_cc12m", "tcl_small")
FILES = sorted((Path(__file__).parent.parent / "configs").glob("*.py"))


@pytest.mark.parametrize(
    "file",
    [*FILES, *(f"{FILES[0].parent}/hpl_{name}.py:resnet50" for name in ("cub200", "inshop"))],
    ids=lambda f: Path(f).stem + str(f).partition(":")[2],
)
def test_full_size_in_shapes(file):
    """Method, optimiser, path rules and the whole train step at full size, without an array."""
    config = configs.load(str(file))
    lexical = lexicon.Lexicon(np.arange(4, 4 + (config.method.get("entries") or 100)), (), {}) if config.tokenizer.lexicon else None
    prompt = lexicon.Prompt("{}", (4, 5), 2, 3) if config.tokenizer.prompt else None
    tokenizer = SimpleNamespace(
        vocab_size=config.tokenizer.vocab_size,
        context_length=config.tokenizer.context_length,
        eos=2,
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
