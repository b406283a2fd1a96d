"""Contrast with a teacher's batch and queue against its definition pair by pair; the circular queue against a loop."""

from functools import partial

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from jax.sharding import NamedSharding, PartitionSpec as P

from jaxvl.losses import momentum
from jaxvl.losses.momentum import Candidates, average, contrast, enqueue
from jaxvl.mesh import MeshOptions, make_mesh

B, Q, D = 4, 6, 3


def unit(rng, *shape):
    x = rng.standard_normal(shape)
    return x / np.linalg.norm(x, axis=-1, keepdims=True)


def inputs(seed=0):
    rng = np.random.default_rng(seed)
    ids, queue_ids = np.int32([1, 2, 1, 3]), np.int32([2, -100, 1, 1, 9, -100])
    return (
        unit(rng, B, D),
        unit(rng, B, D),
        Candidates(unit(rng, B, D), unit(rng, Q, D), ids, queue_ids, np.array([1, 1, 0, 1, 1, 0], bool)),
    )


def slow(x, guide, c, tau, alpha, groups):
    """One pair after the other, float64."""
    total, size = 0.0, B // groups
    for i in range(B):
        others = [j for j in range(B) if j // size == i // size]
        rows = [c.batch[j] for j in others] + [c.queue[j] for j in range(Q)]
        there = [True] * size + ([True] * Q if c.valid is None else list(c.valid))
        same = [j == i or (c.ids is not None and c.ids[i] == c.ids[j]) for j in others]
        same += [c.ids is not None and c.ids[i] == c.queue_ids[j] and c.queue_ids[j] != -100 for j in range(Q)]
        rows, same = ([v for v, ok in zip(values, there, strict=True) if ok] for values in (rows, same))
        exps = [np.exp(np.dot(x[i], r) / tau) for r in rows]
        taught = [np.exp(np.dot(guide[i], r) / tau) for r in rows] if guide is not None else [0.0]
        for e, t, hit in zip(exps, taught if guide is not None else [0.0] * len(exps), same, strict=True):
            y = (alpha * t / sum(taught) if guide is not None else 0) + (1 - alpha * (guide is not None)) * hit / sum(same)
            total -= y * np.log(e / sum(exps)) / B
    return total


@pytest.mark.parametrize("room", [1 << 23, 8], ids=["one block", "a block an entry or two"])
@pytest.mark.parametrize("kind", ["soft", "hard", "ids and gaps", "groups"])
def test_is_the_cross_entropy_of_its_definition(kind, room, monkeypatch):
    monkeypatch.setattr(momentum, "ROOM", room)
    x, guide, c = inputs()
    guide = None if kind == "hard" else guide
    c = c if kind == "ids and gaps" else Candidates(c.batch, c.queue)
    groups = 2 if kind == "groups" else 1
    want = slow(x, guide, c, 0.1, 0.3, groups)
    run = jax.jit(jax.value_and_grad(lambda x, tau, guide: contrast(x, c, tau, guide=guide, alpha=0.3, groups=groups), (0, 1)))
    value, (dx, dtau) = run(np.float32(x), 0.1, None if guide is None else np.float32(guide))
    np.testing.assert_allclose(value, want, rtol=1e-5)
    # The guide's softmax is a constant to the gradient, also where the temperature enters it.
    frozen = lambda x, tau: slow_frozen(x, guide, c, tau, groups)
    for index in ((0, 0), (2, 1), (3, 2)):
        ends = []
        for sign in (1, -1):
            moved = x.copy()
            moved[index] += sign * 1e-5
            ends.append(slow(moved, guide, c, 0.1, 0.3, groups))
        np.testing.assert_allclose(dx[index], (ends[0] - ends[1]) / 2e-5, rtol=1e-4, atol=1e-5)
    np.testing.assert_allclose(dtau, (frozen(x, 0.1 + 1e-6) - frozen(x, 0.1 - 1e-6)) / 2e-6, rtol=1e-4)


def slow_frozen(x, guide, c, tau, groups):
    """As a function of the students' temperature alone: scaling x by 0.1 / tau changes s and leaves the guide's softmax."""
    return slow(np.asarray(x) * 0.1 / tau, guide, c, 0.1, 0.3, groups)


HARD = {
    "one row": lambda rng: (
        unit(rng, 1, D),
        Candidates(unit(rng, 1, D), unit(rng, Q, D), np.int32([5]), np.full(Q, -100, np.int32), np.zeros(Q, bool)),
    ),
    "nothing filled": lambda rng: (
        unit(rng, B, D),
        Candidates(unit(rng, B, D), unit(rng, Q, D), np.arange(B), np.full(Q, -100), np.zeros(Q, bool)),
    ),
    "one image": lambda rng: (
        unit(rng, B, D),
        Candidates(unit(rng, B, D), unit(rng, Q, D), np.full(B, 7), np.full(Q, 7), np.ones(Q, bool)),
    ),
    "zero vectors": lambda rng: (
        np.zeros((B, D)),
        Candidates(np.zeros((B, D)), np.zeros((Q, D)), np.arange(B), np.full(Q, -100), np.ones(Q, bool)),
    ),
}


@pytest.mark.parametrize("name", HARD)
def test_hard_inputs_give_finite_numbers(name):
    x, c = HARD[name](np.random.default_rng(0))
    run = jax.jit(jax.value_and_grad(lambda x, tau, alpha: contrast(x, c, tau, guide=c.batch, alpha=alpha), (0, 1)))
    for tau in (0.001, 0.5):
        for alpha in (0.0, 0.4, 1.0):
            value, grads = run(np.float32(x), tau, alpha)
            assert np.isfinite(value) and all(np.isfinite(g).all() for g in grads), (tau, alpha)
    if name == "one row":
        assert value == 0


@pytest.mark.parametrize("sizes", [(8, 1, 1), (2, 2, 2)], ids=str)
def test_equal_on_every_mesh_and_the_queue_stays_where_it_lies(sizes):
    rng = np.random.default_rng(1)
    x, guide, batch, queue = (np.float32(unit(rng, n, 16)) for n in (8, 8, 8, 4096))
    f = jax.value_and_grad(lambda x, guide, batch, queue: contrast(x, Candidates(batch, queue), 0.07, guide=guide, alpha=0.4))
    want, want_grad = jax.jit(f)(x, guide, batch, queue)
    mesh = make_mesh(MeshOptions(*sizes))
    with jax.set_mesh(mesh):
        args = [jax.device_put(a, NamedSharding(mesh, P(("data", "fsdp")))) for a in (x, guide, batch, queue)]
        program = jax.jit(f).lower(*args).compile()
        value, grad = program(*args)
    np.testing.assert_allclose(value, want, rtol=1e-6)
    np.testing.assert_allclose(grad, want_grad, rtol=1e-5, atol=1e-6)
    assert "f32[4096,16]" not in program.as_text()


def test_blocks_divide_what_a_device_has():
    assert momentum.blocks(512, 65536) == 4
    assert momentum.blocks(4, 6) == 1
    assert momentum.blocks(1 << 23, 7) == 7


@pytest.mark.parametrize(("length", "count"), [(6, 4), (6, 6), (5, 7), (4, 13), (1, 3), (7, 1)])
def test_a_queue_is_written_in_a_circle(length, count):
    queue, want, pointer, seen = np.zeros((length, 2)), np.zeros((length, 2)), length // 2, 0
    write = jax.jit(enqueue)
    for _ in range(4):
        rows = seen + np.arange(1.0, 2 * count + 1).reshape(count, 2)
        queue = write(queue, pointer, rows)
        for row in rows:
            want[pointer % length] = row
            pointer += 1
        pointer, seen = pointer % length, seen + 100
        np.testing.assert_array_equal(queue, want)
    assert write(np.zeros(length, np.int32), 0, np.arange(count, dtype=np.int32)).dtype == jnp.int32


def test_the_teacher_follows_what_it_has_of_the_student():
    student = {"a": {"k": jnp.full(2, 3.0)}, "itm": jnp.ones(1)}
    pull = lambda teacher: sum(map(jnp.sum, jax.tree.leaves(average(teacher, student, 0.75))))
    teacher = {"a": {"k": jnp.ones(2)}}
    np.testing.assert_allclose(average(teacher, student, 0.75)["a"]["k"], [1.5, 1.5])
    moved = partial(average, teacher, momentum=0.75)
    assert jax.grad(lambda s: jnp.sum(moved(s)["a"]["k"]))(student)["a"]["k"].sum() == 0
    assert pull(teacher) == 3.0
