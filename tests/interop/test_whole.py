"""A whole method from an imported checkpoint or another run: parameters, teacher and queues, at another resolution."""

import json
from pathlib import Path

import jax
import numpy as np
import pytest
from ml_collections import ConfigDict

from jaxvl import config as configs
from jaxvl.data.text import TokenizerOptions, train_tokenizer
from jaxvl.interop import importing, initial
from jaxvl.interop.positions import resize_table
from jaxvl.parts import assemble
from jaxvl.state import create
from tests.interop.test_albef import state, write

HF = Path(__file__).parent.parent / "fixtures" / "parity" / "hf"
FLAT = dict(dropout=0.0, attention_dropout=0.0, dtype="float32")


@pytest.fixture(scope="module")
def tokenizer():
    return train_tokenizer(["a green circle over a red square"], TokenizerOptions(vocab_size=512, context_length=8))


@pytest.fixture(scope="module")
def imported(tmp_path_factory):
    """The recorded tiny TCL as `jaxvl import` leaves it, 32 pixels and 97 words."""
    root = tmp_path_factory.mktemp("imported")
    importing.run(str(write(root / "tcl.safetensors", state("e2e_pretrain"))), root / "tcl", heads=4)
    return root / "tcl"


def planned(folder, tokenizer, **sections):
    """Shapes of the state of a run at 48 pixels, and what is planned for it. Its vocabulary is the tokenizer's, so words start anew."""
    tower = lambda kind, **kw: {**importing.tower(folder, kind), "dtype": "float32", **kw}
    base = dict(
        method=dict(name="tcl", width=16, fusion_depth=2, queue=24, scope="global", unfilled="mask", ids=True, alpha_steps=10),
        image=tower("image"), text=tower("text", vocab_size=0, positions=0), init=dict(whole=str(folder), skip="embed$|mlm/bias$"),
        tokenizer=dict(context_length=8, vocab_size=512), data=dict(source="x", image_size=48, id="sample"), train=dict(batch_size=8, steps=2),
    )  # fmt: skip
    recipe = configs.read(configs.complete(ConfigDict({**base, **{k: {**base.get(k, {}), **v} for k, v in sections.items()}})))
    parts = assemble(recipe, tokenizer)
    params, memory = jax.eval_shape(lambda key: parts.method.init(key, parts.spec), jax.random.key(0))
    return (params, memory), initial.plan(parts.recipe, params, tokenizer.offset, memory)


def filled(shapes, leaves, mark=-7):
    """The state that was all `mark` before."""
    params, memory = jax.tree.map(lambda s: jax.numpy.full(s.shape, mark, s.dtype), shapes)
    return initial.fill(leaves, create(params, memory, (), jax.random.key(0), ema=False))


def test_everything_of_an_imported_checkpoint_at_another_resolution(imported, tokenizer, capsys):
    shapes, leaves = planned(imported, tokenizer)
    table = capsys.readouterr().err
    assert table.count("resized from 4 x 4 to 6 x 6, bicubic") == 2 and table.count("the first 8 of 32 rows") == 2
    new = sorted(line.split()[1] for line in table.splitlines() if line.endswith("  new"))
    words = ["mlm/bias", "text/embed"]
    assert new == sorted(words + [f"memory/teacher/{w}" for w in words] + ["memory/id_queue", "memory/step"])
    after, arrays = filled(shapes, leaves), state("e2e_pretrain")
    for side, end in ((after.params, ""), (after.memory["teacher"], "_m")):
        want = resize_table(arrays[f"visual_encoder{end}.pos_embed"][0], 1, (6, 6), "bicubic")
        np.testing.assert_array_equal(side["image"]["pos"], want)
        np.testing.assert_array_equal(side["text"]["pos"], arrays[f"text_encoder{end}.bert.embeddings.position_embeddings.weight"][:8])
        np.testing.assert_array_equal(side["image_proj"]["kernel"], arrays[f"vision_proj{end}.weight"].T)
        assert (np.asarray(side["text"]["embed"]) == -7).all()
    assert not np.array_equal(after.params["image"]["pos"], after.memory["teacher"]["image"]["pos"])  # the teacher's own, not a copy
    np.testing.assert_array_equal(after.memory["image_queue"], arrays["image_queue"].T)
    assert int(after.memory["pointer"]) == int(arrays["queue_ptr"][0]) and int(after.memory["filled"]) == 24
    assert int(after.memory["step"]) == -7 and (np.asarray(after.memory["id_queue"]) == -7).all()  # as the method made them


def test_a_queue_that_starts_anew_has_no_place_from_before(imported, tokenizer):
    _, leaves = planned(imported, tokenizer, method=dict(queue=40), init=dict(skip="embed$|mlm/bias$|_queue$"))
    assert not {"memory/pointer", "memory/filled", "memory/image_queue"} & leaves.keys()
    with pytest.raises(ValueError, match=r"memory/image_queue has \(24, 16\).*set config\.method\.queue=24, or start it anew"):
        planned(imported, tokenizer, method=dict(queue=40))


def test_a_run_hands_over_everything_but_its_count_of_steps(imported, tokenizer, tmp_path):
    """What a run saved, as another run starts from it: the paths of the first are those of the second."""
    from jaxvl import checkpoint

    shapes, leaves = planned(imported, tokenizer)
    first = filled(shapes, leaves, mark=3)
    with checkpoint.open_saver(tmp_path / "run" / "checkpoints", checkpoint.CheckpointOptions()) as saver:
        saver.save(5, first, {}, block=True)
    tower = lambda kind: {**importing.tower(imported, kind), "dtype": "float32"}
    (tmp_path / "run" / "config.json").write_text(json.dumps({"image": tower("image"), "text": {**tower("text"), "vocab_size": 0}}))
    shapes, leaves = planned(
        imported, tokenizer, init=dict(whole=str(tmp_path / "run"), skip=""), method=dict(ids=False), data=dict(image_size=64, id="")
    )
    second = filled(shapes, leaves)
    assert int(second.memory["step"]) == -7 and int(second.memory["filled"]) == 24 and "id_queue" not in second.memory
    np.testing.assert_array_equal(second.params["text"]["embed"], first.params["text"]["embed"])
    np.testing.assert_array_equal(
        second.memory["teacher"]["image"]["pos"], resize_table(np.asarray(first.memory["teacher"]["image"]["pos"]), 1, (8, 8), "bicubic")
    )
    same = ("text", "fusion", "image_proj", "itm", "mlm", "temperature")
    jax.tree.map(np.testing.assert_array_equal, {k: second.params[k] for k in same}, {k: first.params[k] for k in same})


def test_a_bert_is_parted_between_text_and_fusion_layers(tokenizer, tmp_path):
    importing.run(str(HF / "bert" / "model.safetensors"), tmp_path / "bert")
    bert = importing.read(tmp_path / "bert").model
    text = {**importing.tower(tmp_path / "bert", "text"), **FLAT, "depth": 1, "pooler": 0, "vocab_size": 0}
    image = dict(variant="", patch=8, width=16, depth=1, heads=2, mlp_dim=16, dtype="float32")
    sections = dict(
        image=image, text=text, method=dict(fusion_depth=2), init=dict(whole="", text=str(tmp_path / "bert"), skip="embed$|mlm/bias$")
    )
    recipe = dict(
        method=dict(name="tcl", width=16, fusion_depth=2, queue=24, scope="global"), tokenizer=dict(context_length=8, vocab_size=512),
        data=dict(source="x", image_size=16), train=dict(batch_size=8, steps=2),
    )  # fmt: skip
    recipe = configs.read(configs.complete(ConfigDict({**recipe, **{k: {**recipe.get(k, {}), **v} for k, v in sections.items()}})))
    parts = assemble(recipe, tokenizer)
    shapes = jax.eval_shape(lambda key: parts.method.init(key, parts.spec), jax.random.key(0))
    after = filled(shapes, initial.plan(parts.recipe, shapes[0], tokenizer.offset, shapes[1]))
    from jaxvl.interop import load

    whole = load.load(HF / "bert" / "model.safetensors").params["text"]["blocks"]
    for side in (after.params, after.memory["teacher"]):
        got = jax.tree.map(
            lambda a, b: np.concatenate([a, b]), side["text"]["blocks"], {k: side["fusion"]["blocks"][k] for k in side["text"]["blocks"]}
        )
        jax.tree.map(np.testing.assert_array_equal, got, whole)
        assert (np.asarray(side["fusion"]["blocks"]["cross"]["k"]["kernel"]) == -7).all()
    if bert.head == "mlm_tied":
        np.testing.assert_array_equal(
            after.params["mlm"]["transform"]["bias"], load.load(HF / "bert" / "model.safetensors").params["mlm"]["transform"]["bias"]
        )
    with pytest.raises(ValueError, match=r"config\.text\.depth is 2; .* was trained with 3"):
        parts = assemble(recipe._replace(text=recipe.text._replace(depth=2)), tokenizer)
        shapes = jax.eval_shape(lambda key: parts.method.init(key, parts.spec), jax.random.key(0))
        initial.plan(parts.recipe, shapes[0], tokenizer.offset, shapes[1])
