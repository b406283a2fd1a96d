"""Ranks against a sort written out per query; the streamed route against the exact one, ties, blocks and devices."""

import warnings

import jax
import numpy as np
import pytest
from hypothesis import given, settings, strategies as st

from jaxvl.evals import ranking, streamed, topk
from jaxvl.mesh import MeshOptions, make_mesh

MESHES = [MeshOptions(), MeshOptions(data=2, fsdp=2, tensor=2), MeshOptions(data=1)]


def mesh(options: MeshOptions) -> jax.sharding.Mesh:
    return make_mesh(options, jax.devices()[: abs(options.data) if options == MESHES[2] else 8])


def by_sorting(scores: np.ndarray, right: np.ndarray) -> list[tuple[int, int, int]]:
    """The three ranks of each query from a sorted list, as the definitions say."""
    out = []
    for s, r in zip(scores, right, strict=True):
        if not r.any():
            out.append((-1, -1, -1))
            continue
        order = sorted(range(len(s)), key=lambda i: (-s[i], i))
        first = next(i for i in order if r[i])
        wrong = [i for i in order if not r[i]]
        before = order.index(first)
        out.append((sum(s[i] > s[first] for i in wrong), sum(s[i] >= s[first] for i in wrong), before))
    return out


@given(st.integers(0, 2**32 - 1), st.integers(1, 12), st.integers(1, 15), st.integers(1, 6))
@settings(max_examples=60, deadline=None)
def test_exact_ranks_are_those_of_a_sort(seed: int, queries: int, items: int, levels: int) -> None:
    rng = np.random.default_rng(seed)
    scores, right = rng.integers(0, levels, (queries, items)) / 3, rng.random((queries, items)) < 0.3
    assert list(zip(*ranking.exact_ranks(scores, right), strict=True)) == by_sorting(scores, right)


@pytest.mark.parametrize("options", MESHES, ids=str)
@pytest.mark.parametrize(("queries", "items", "block"), [(37, 83, 16), (5, 200, 64), (90, 3, 4096)])
def test_streamed_ranks_are_the_exact_ones(options: MeshOptions, queries: int, items: int, block: int) -> None:
    rng = np.random.default_rng(queries)
    q, g = rng.integers(-2, 3, (queries, 4)), rng.integers(-2, 3, (items, 4))  # products are whole numbers: many exact ties
    q_group, g_group = rng.integers(0, 9, queries), rng.integers(0, 9, items)
    exact = ranking.exact_ranks((q @ g.T).astype(float), q_group[:, None] == g_group)
    for ours, wanted in zip(streamed.streamed_ranks(q, g, q_group, g_group, mesh(options), block=block), exact, strict=True):
        np.testing.assert_array_equal(ours, wanted)


def test_streamed_leave_one_out_skips_the_row_itself_and_no_other() -> None:
    rng = np.random.default_rng(0)
    x, group = rng.integers(-1, 2, (45, 3)), rng.integers(0, 8, 45)
    exact = ranking.exact_ranks((x @ x.T).astype(float), group[:, None] == group, ~np.eye(45, dtype=bool))
    ours = streamed.streamed_ranks(x, x, group, group, mesh(MESHES[0]), leave_one_out=True, block=16)
    for a, b in zip(ours, exact, strict=True):
        np.testing.assert_array_equal(a, b)


@pytest.mark.parametrize("block", [16, 24, 4096])
def test_the_two_passes_score_a_pair_alike(block: int) -> None:
    """Were a right item's score computed otherwise in the second pass, a copy of it under a wrong name would rank by chance."""
    rng = np.random.default_rng(1)
    right = rng.normal(size=(96, 33)).astype(np.float32)
    queries = right + 0.1 * rng.normal(size=right.shape).astype(np.float32)
    gallery = np.concatenate([right, right])  # item i + 96 is item i under a name no query has
    group = np.arange(96)
    ranks = streamed.streamed_ranks(queries, gallery, group, np.concatenate([group, group + 1000]), mesh(MESHES[0]), block=block)
    assert (ranks.optimistic == 0).all() and (ranks.stable == 0).all() and (ranks.pessimistic == 1).all()


@pytest.mark.parametrize(("devices", "options"), [(1, MESHES[0]), (2, MESHES[0]), (4, MESHES[0]), (8, MESHES[0]), (8, MESHES[1])], ids=str)
def test_the_nearest_are_those_of_a_stable_sort(devices: int, options: MeshOptions) -> None:
    """A count that no number of devices divides, blocks that do not fill, many equal scores, and k beyond a device's share and beyond all."""
    rng = np.random.default_rng(2)
    queries, items = rng.integers(-2, 3, (21, 4)), rng.integers(-2, 3, (37, 4))
    placed = topk.place_array(items, make_mesh(options, jax.devices()[:devices]), block=3)
    assert placed.items.addressable_shards[0].data.shape[0] * devices == placed.items.shape[0]
    order, before = np.argsort(-(queries @ items.T), axis=1, kind="stable"), topk._top._cache_size()
    for k in (1, 10, 50):
        ids, scores = topk.top(placed, queries, k, block=8)
        np.testing.assert_array_equal(ids, order[:, :k])
        np.testing.assert_array_equal(scores, np.take_along_axis(queries @ items.T, order[:, :k], 1))
    assert topk._top._cache_size() == before + 3  # one program for all blocks of queries


def test_one_program_of_one_block_serves_all_blocks_and_both_passes() -> None:
    block, rows, d = 64, 500, 8
    x, group = np.random.default_rng(3).normal(size=(rows, d)), np.arange(rows)
    program = streamed._program(mesh(MESHES[1]))
    before = program._cache_size()
    streamed.streamed_ranks(x, x, group, group, mesh(MESHES[1]), block=block)
    assert program._cache_size() == before + 1

    shape = lambda *s, t=np.int32: jax.ShapeDtypeStruct(s, t)
    floats = shape(block, d, t=np.float32)
    counts = streamed.Counts(shape(block, t=np.float32), *(shape(block) for _ in range(4)))
    args = counts, floats, shape(block), shape(block), None, floats, shape(block), shape(), shape(t=np.bool_)
    assert program.lower(*args).compile().memory_analysis().temp_size_in_bytes < 40 * block * block / 8


def test_what_has_no_rank_is_refused() -> None:
    x = np.ones((4, 2))
    broken = x.copy()
    broken[1, 0] = np.nan
    group = np.arange(4)
    with pytest.raises(ValueError, match="1 of 4 gallery embeddings are not finite"):
        streamed.streamed_ranks(x, broken, group, group, mesh(MESHES[0]))
    with pytest.raises(ValueError, match="1 of 8 scores are NaN"):
        ranking.exact_ranks(broken, np.ones((4, 2), bool))
    with pytest.raises(ValueError, match="no gallery embedding"):
        topk.nearest(x, x[:0], 1, mesh(MESHES[0]))
    with pytest.raises(ValueError, match=r"k=5 must lie between 1 and the 4 items"):
        topk.nearest(x, x, 5, mesh(MESHES[0]))
    with pytest.raises(ValueError, match="folds=3 does not divide 4 images"):
        list(ranking.folds(group, 4, 3))


def test_averages_leave_out_queries_without_a_right_item() -> None:
    ranks = np.array([0, -1, 3, 10, 0])
    np.testing.assert_array_equal(ranking.recall_at(ranks, (1, 4, 10)), [0.5, 0.75, 0.75])
    assert ranking.median_rank(ranks) == 2.5
    assert np.isnan(ranking.recall_at(np.array([-1]), (1,))).all() and np.isnan(ranking.median_rank(np.array([-1])))


def test_a_warning_where_the_order_of_equal_scores_decides() -> None:
    tied = ranking.exact_ranks(np.ones((3, 3)), np.eye(3, dtype=bool))
    clear = ranking.exact_ranks(np.eye(3), np.eye(3, dtype=bool))
    with pytest.warns(UserWarning, match=r"i2t: equal scores .* \(R@1 1.0000 or 0.0000\)"):
        numbers = ranking.both_ways(tied, clear, (1,))
    assert numbers == pytest.approx({"i2t/r@1": 1 / 3, "i2t/median_rank": 2, "t2i/r@1": 1, "t2i/median_rank": 1, "rsum": 400 / 3})
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        ranking.both_ways(clear, clear)
