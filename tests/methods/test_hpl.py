"""HPL inside the step: when a hierarchy is learned and renewed, what it moves and what it leaves alone, on one device and on eight."""

import itertools
from functools import cache

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from jax.sharding import NamedSharding, PartitionSpec as P

from jaxvl import config as configs, config_file
from jaxvl.data import glyphs
from jaxvl.data.augment import AugmentOptions
from jaxvl.losses import hierarchy
from jaxvl.mesh import MeshOptions, make_mesh, path_str, place, shardings
from jaxvl.methods import METHODS
from jaxvl.methods.hpl import HplOptions, check, complete
from jaxvl.methods.method import Run
from jaxvl.models.flops import resnet_flops
from jaxvl.models.resnet import ResnetOptions
from jaxvl.models.text import TextOptions
from jaxvl.models.vit import VitOptions
from jaxvl.optim import OptimOptions, check_constant, learning_rate, make_optimizer
from jaxvl.state import STATE_RULES, create
from jaxvl.step import make_train_step

IMAGE = VitOptions(variant="", width=8, depth=1, heads=2, mlp_dim=16, patch=4, dtype="float32")
OPTIM = OptimOptions(
    learning_rate=0.02, schedule="constant", b2=0.999, weight_decay=1e-4, decay="", clip_norm=0.0, groups=(("^proxies$", 5.0),)
)
CLASSES, RUN = 13, Run(steps=8, epoch=2, warmup=1, classes=13, parents=((0, 0, 1, 1, 2, 2, 2, 3, 3, 4, 4, 4, 4), (0, 0, 1, 1, 1)))
SPEC = {"image": jax.ShapeDtypeStruct((16, 8, 8, 3), jnp.float32), "label": jax.ShapeDtypeStruct((16,), jnp.int32)}


def options(**kw):
    return complete(
        HplOptions(
            **{
                "width": 6,
                "num_coarse": (4,),
                "hierarchy_start": 2,
                "refresh_every": 3,
                "pad_to": 8,
                "block": 2,
                "level_weights": (1.0, 0.5),
            }
            | kw
        ),
        RUN,
    )


def batch(t):
    rng = np.random.default_rng(t)
    return {"image": rng.integers(0, 256, SPEC["image"].shape, np.uint8), "label": rng.integers(0, CLASSES, 16).astype(np.int32)}


@cache
def trained(mesh=None, steps=7, **kw):
    """[state before each step and after the last], metrics of each step."""
    method = METHODS["hpl"].build(IMAGE, TextOptions(), options(**kw))
    params, memory = method.init(jax.random.key(0), SPEC)
    optim = OPTIM._replace(groups=(*OPTIM.groups, *([("^coarse/", 5.0)] if "coarse" in params else [])))
    tx = make_optimizer(optim, params, steps, method.renewed)
    state = create(params, memory, tx.init(params), jax.random.key(1), ema=False)
    grid = make_mesh(mesh or MeshOptions(1), jax.devices()[: 8 if mesh else 1])
    with jax.set_mesh(grid):
        placed = shardings(state, (*STATE_RULES, *method.rules), grid)
        state = jax.device_put(state, placed)
        step = make_train_step(method, tx, AugmentOptions(), optim, learning_rate(optim, steps), image_size=8, grad_shardings=placed.params)
        step = jax.jit(step, out_shardings=(placed, NamedSharding(grid, P())))
        states, logged = [state], []
        for t in range(steps):
            state, metrics = step(state, place(batch(t), grid))
            states.append(state)
            logged.append({k: float(v) for k, v in metrics.items()})
    return states, logged


def coarse(state):
    return state.params["coarse"]["1"] if "coarse" in state.params else state.memory["hierarchy"].coarse[0]


def test_a_frozen_hierarchy_is_learned_at_its_start_and_renewed_every_period():
    states, logged = trained()
    assert [int(s.memory["refreshed"]) for s in states] == [-1, -1, -1, 2, 2, 2, 5, 5]
    for t, metrics in enumerate(logged):
        want = metrics["level_0"] + (0.5 * metrics["level_1"] if t >= 2 else 0)
        np.testing.assert_allclose(metrics["loss"], want, rtol=1e-5)
    np.testing.assert_array_equal(coarse(states[3]), coarse(states[5]))
    old, p = states[5], states[5].params["proxies"]
    again = hierarchy.refresh(p, old.memory["hierarchy"], CLASSES)
    np.testing.assert_allclose(coarse(states[6]), again.coarse[0], rtol=1e-5, atol=1e-6)
    np.testing.assert_array_equal(states[6].memory["hierarchy"].parents[0], again.parents[0])
    assert int(states[3].memory["hierarchy"].counts[0].sum()) == CLASSES


def test_a_hierarchy_that_has_begun_goes_on_when_the_run_grows_longer():
    """Its start moves with half of the run; what was learned is renewed in its turn, and not built anew."""
    states, _ = trained()
    for start in (1, 5, 100):
        method = METHODS["hpl"].build(IMAGE, TextOptions(), options(hierarchy_start=start))
        refresh = jax.jit(method.refresh)
        still, renewed = (refresh(states[t].params, states[t].memory, jnp.int32(t)).memory for t in (4, 5))
        jax.tree.map(np.testing.assert_array_equal, still, states[5].memory)
        jax.tree.map(lambda a, b: np.testing.assert_allclose(a, b, rtol=1e-5), renewed, states[6].memory)


@pytest.mark.parametrize("mode", ["tied", pytest.param("free", marks=pytest.mark.long)])
def test_eight_devices_train_as_one(mode):
    quick = dict(coarse_mode=mode, hierarchy_start=1, refresh_every=2, steps=4)
    one, logged = trained(**quick)
    many, logged_many = trained(MeshOptions(2, 2, 2), **quick)
    assert [int(s.memory["refreshed"]) for s in many] == [-1, -1, 1, 1, 3]
    for a, b in zip(logged, logged_many, strict=True):
        np.testing.assert_allclose(a["loss"], b["loss"], rtol=2e-4)
    np.testing.assert_allclose(one[-1].params["proxies"], many[-1].params["proxies"], rtol=2e-2, atol=2e-3)
    assert many[-1].params["proxies"].sharding.spec == P(("data", "fsdp", "tensor")) and many[-1].memory["hierarchy"].parents[
        0
    ].sharding.spec == P(("data", "fsdp", "tensor"))


def test_free_coarse_proxies_move_and_a_refresh_overwrites_them_and_forgets_their_moments():
    states, _ = trained(coarse_mode="free")
    assert np.abs(np.asarray(coarse(states[4])) - np.asarray(coarse(states[3]))).max() > 1e-3

    def first_moment(state):
        return next(
            np.asarray(x)
            for path, x in jax.tree_util.tree_leaves_with_path(state.opt_state)
            if ".mu['coarse']" in jax.tree_util.keystr(path)
        )

    # The refresh of step 5; after it the moments hold a tenth of one gradient, and the step is Adam's first, as long as the learning rate.
    old = states[5].memory["hierarchy"]._replace(coarse=(coarse(states[5]),))
    again = hierarchy.refresh(states[5].params["proxies"], old, CLASSES).coarse[0]
    grads = first_moment(states[6]) / 0.1
    clear = np.abs(grads) > 1e-4
    np.testing.assert_allclose((coarse(states[6]) - again)[clear], -0.1 * np.sign(grads[clear]), rtol=2e-2)
    assert clear.mean() > 0.9


def test_a_given_hierarchy_is_the_datas_and_stays():
    states, logged = trained(hierarchy="given", num_coarse=(0, 0), level_weights=(1.0, 0.5, 0.25))
    above = states[-1].memory["hierarchy"]
    assert above.parents[0].tolist()[:CLASSES] == list(RUN.parents[0]) and above.counts[0].tolist() == [2, 2, 3, 2, 4]
    m = logged[0]
    np.testing.assert_allclose(m["loss"], m["level_0"] + 0.5 * m["level_1"] + 0.25 * m["level_2"], rtol=1e-5)
    assert sorted(states[-1].params["coarse"]) == ["1", "2"]
    means, _ = trained(hierarchy="given", num_coarse=(5,), coarse_mode="frozen", steps=4)
    assert int(means[-1].memory["refreshed"]) == 2
    unit = lambda p: p / np.linalg.norm(p, axis=1, keepdims=True)
    p = unit(np.asarray(means[2].params["proxies"])[:2])
    np.testing.assert_allclose(coarse(means[3])[0], p.mean(0), rtol=1e-4, atol=1e-6)


def test_no_hierarchy_is_the_base_loss_and_sampling_is_in_the_step():
    states, logged = trained(hierarchy="none", negative_sampling=0.4, steps=2)
    assert states[0].memory == () and logged[0]["loss"] == logged[0]["level_0"] and np.isfinite(logged[1]["loss"])


def test_options_are_completed_from_the_run_and_refused_by_name():
    o = complete(HplOptions(), Run(steps=1000, epoch=7, warmup=30, classes=100))
    assert (o.classes, o.num_coarse, o.hierarchy_start, o.refresh_every, o.coarse_mode) == (100, (10,), 500, 100, "frozen")
    assert complete(HplOptions(hierarchy_start="end_of_warmup"), Run(warmup=30, classes=4)).hierarchy_start == 30
    assert complete(HplOptions(hierarchy="given", num_coarse=(0, 0)), RUN).num_coarse == (5, 2)
    for words, kw in (
        ("the data give 2 of 3 levels", {"hierarchy": "given", "num_coarse": (0, 0, 0), "level_weights": (1.0,) * 4}),
        ("classes is 12, but the training data have 13", {"classes": 12}),
        ("level_weights is \\(1.0,\\); with 1 coarse", {"level_weights": (1.0,)}),
        ("num_coarse is \\(14,\\)", {"num_coarse": (14,)}),
        ("num_coarse is \\(4,\\), but the hierarchy of the data has \\(5,\\) groups", {"hierarchy": "given"}),
        ("negative_sampling is 0.5 with proxy_nca;", {"base_loss": "proxy_nca", "negative_sampling": 0.5}),
        ("parents has \\(3,\\) entries", {"hierarchy": "given", "parents": ((0, 1, 0),)}),
        ("names the group 9", {"hierarchy": "given", "parents": ((9,) + (0,) * 12,)}),
        ("config.method.alpha is 0", {"alpha": 0.0}),
    ):
        with pytest.raises(ValueError, match=words):
            check(options(**kw))
    with pytest.raises(ValueError, match="config.method.classes is 0"):
        complete(HplOptions(), Run())


def test_a_residual_network_with_frozen_normalisation():
    """Its encoder trains, its normalisation stands still though everything decays; an optimiser that would move that is refused."""
    image = ResnetOptions(depth=0, stages=(1,), width=2, pool="avg+max", dtype="float32", head_bias=True)
    method = METHODS["hpl"].build(image, TextOptions(), options(hierarchy="none"))
    params, memory = method.init(jax.random.key(0), SPEC)
    optim = OPTIM._replace(groups=((method.constant, 0.0), *OPTIM.groups))
    tx = make_optimizer(optim, params, 1)
    step = make_train_step(method, tx, AugmentOptions(), optim, learning_rate(optim, 1), image_size=8, grad_shardings=None)
    after, _ = jax.jit(step)(create(params, memory, tx.init(params), jax.random.key(1), ema=False), batch(0))
    flat = lambda tree: {path_str(path): np.asarray(x) for path, x in jax.tree_util.tree_leaves_with_path(tree)}
    before, moved = flat(params["image"]), flat(after.params["image"])
    assert {name for name in before if np.array_equal(before[name], moved[name])} == {name for name in before if "norm" in name}
    assert method.flops(SPEC) > resnet_flops(image._replace(head=6), 8, 8)
    check_constant(optim, params, method.constant)
    with pytest.raises(ValueError, match=r"config.optim trains image/stage1_0/norm1/bias.*freeze it with the group"):
        check_constant(OPTIM, params, method.constant)
    with pytest.raises(ValueError, match="config.image.statistics is 'batch'"):
        METHODS["hpl"].build(image._replace(statistics="batch"), TextOptions(), options(hierarchy="none"))


def recipe(name, *overrides):
    return configs.read(configs.load(f"configs/{name}", overrides))


@pytest.mark.parametrize("name", ["cars196", "cub200", "inaturalist", "inshop", "small", "small.py:emoji", "sop"])
def test_recipes_say_how_many_groups_they_learn_and_need_no_levels_for_it(name):
    file = f"hpl_{name}" + ".py" * (".py" not in name)
    read = recipe(file)
    assert all(read.method.num_coarse) and len(read.method.level_weights) == 1 + len(read.method.num_coarse)
    assert read.data.levels == () and recipe(file, "method.hierarchy=given").data.levels


def test_convolutional_recipes_warm_up_for_five_epochs_as_published():
    for name, epoch in (("cub200", 5864 // 120), ("cars196", 8054 // 120)):
        held = {backbone: recipe(f"hpl_{name}.py:{backbone}").optim.hold for backbone in ("dinov2", "resnet50")}
        assert held == {"dinov2": (("^image/(?!head)", epoch),), "resnet50": (("^image/(?!head)", 5 * epoch),)}


def test_every_hierarchy_of_a_table_has_the_groups_of_the_given_one():
    letters = {glyphs.base_name(glyph.char) for glyph in itertools.islice(glyphs.glyphs("train"), glyphs.PARTS["train"])}
    for data, groups in (("glyphs", len(letters)), ("emoji", 97)):
        rows = config_file.run("configs/sweeps/proxies.py")["sweep"](data)["rows"]
        levels = {name: row.get("method.num_coarse") for name, row in rows.items() if row.get("method.hierarchy") != "none"}
        assert len(levels) == 5 and set(levels.values()) == {(groups,)}
        assert recipe(f"hpl_small.py:{data}").method.num_coarse == (groups,)
