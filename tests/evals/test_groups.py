"""Grouped recall in every kind of image-text retrieval, against loops over each query's items: a set in which captions and classes repeat."""

import io
import json
import math
import tarfile
from itertools import combinations

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from PIL import Image

from jaxvl import evals
from jaxvl.data.augment import AugmentOptions
from jaxvl.data.stream import DataOptions
from jaxvl.evals import groups, ranking, streamed
from jaxvl.evals.lexical import LexicalOptions
from jaxvl.evals.rerank import RerankOptions
from jaxvl.evals.retrieval import RetrievalOptions
from jaxvl.mesh import MeshOptions, make_mesh
from jaxvl.report.summary import last_line
from tests.evals.test_rerank import Numbers, method, tables

# Captions of each image; several share one, and equal classes are not equal captions.
CAPTIONS = [["1", "2"], ["2", "3"], ["4"], ["4", "5"], ["6"], ["7"], ["1"], ["8", "9"], ["7"]]
CLASSES = ["a", "b", "b", "c", "a", "d", "a", "c", "c"]
IMAGES, TAU, KS = len(CAPTIONS), 0.1, (1, 2, 3)
TEXTS = [(i, caption) for i, some in enumerate(CAPTIONS) for caption in some]
RIGHT = {
    "": lambda i, owner, caption: i == owner,
    "caption": lambda i, owner, caption: caption in CAPTIONS[i],
    "class": lambda i, owner, caption: CLASSES[i] == CLASSES[owner],
}
pytestmark = pytest.mark.filterwarnings("ignore:.*equal scores")  # equal captions have equal scores


@pytest.fixture(scope="module")
def shard(tmp_path_factory) -> str:
    path = tmp_path_factory.mktemp("grouped") / "val-0000.tar"
    with tarfile.open(path, "w") as tar:
        for i, (captions, name) in enumerate(zip(CAPTIONS, CLASSES, strict=True)):
            out = io.BytesIO()
            Image.new("RGB", (8, 8), (i * 8, 0, 0)).save(out, "PNG")
            meta = {"captions": captions, "class": name} | ({"odd": 1.5} if i == 7 else {"odd": "x"})
            for suffix, body in ("png", out.getvalue()), ("txt", captions[0].encode()), ("json", json.dumps(meta).encode()):
                member = tarfile.TarInfo(f"{i:03d}.{suffix}")
                member.size = len(body)
                tar.addfile(member, io.BytesIO(body))
    return str(path)


def run(entry, mesh=MeshOptions(data=1), tau: float | None = TAU):
    known = tables() | ({} if tau is None else {"tau": tau})
    pair = method().score_pair._replace(temperature=None if tau is None else lambda params: params["tau"])
    options = DataOptions(image_size=8, threads=1, workers=0)
    with jax.set_mesh(make_mesh(mesh, jax.devices()[: math.prod(mesh)])):
        return evals.run({"val": entry}, method()._replace(score_pair=pair), jax.tree.map(jnp.float32, known), Numbers(), options,
                         AugmentOptions(mean=(0.0,) * 3, std=(1.0,) * 3))  # fmt: skip


def cosines() -> np.ndarray:
    of = tables()
    unit = lambda x: x / np.linalg.norm(x, axis=1, keepdims=True)
    return unit(of["image"][:IMAGES]) @ unit(of["word"][[int(c) for _, c in TEXTS]]).T


def wanted(scores: np.ndarray, group: str, k_test: int = 99, first: np.ndarray | None = None) -> dict[str, float]:
    """R@K both ways with `scores` [image, text] of the k_test best by `first`, counted query by query."""
    right = np.array([[RIGHT[group](i, *text) for text in TEXTS] for i in range(IMAGES)])
    first = scores if first is None else first
    out = {}
    for way, turn in ("i2t", np.asarray), ("t2i", np.transpose):
        best = []
        for row, cosine, answers in zip(turn(scores), turn(first), turn(right), strict=True):
            proposed = sorted(range(len(row)), key=lambda j: (-cosine[j], j))[:k_test]
            order = sorted(range(len(row)), key=lambda j: (j not in proposed, -row[j] if j in proposed else 0, j))
            best.append(min(order.index(j) for j in np.flatnonzero(answers)))
        out |= {f"{way}/r@{k}": np.mean(np.array(best) < k) for k in KS}
    return out


def test_the_set_tells_the_groups_apart():
    found = [wanted(np.round(cosines(), 6), group) for group in RIGHT]
    for way in "i2t", "t2i":
        assert len({tuple(numbers[f"{way}/r@{k}"] for k in KS) for numbers in found}) == len(RIGHT)


@pytest.mark.parametrize("group", RIGHT)
@pytest.mark.parametrize("mesh", [MeshOptions(data=1), MeshOptions(data=2, fsdp=2)], ids=str)
def test_every_kind_counts_the_group(shard, group, mesh):
    common = dict(source=shard, captions=2, group=group, ks=KS, batch_size=4, show=IMAGES)
    dual = wanted(np.round(cosines(), 6), group)
    match = tables()["match"][:IMAGES][:, [int(c) for _, c in TEXTS]]
    values, shown = run(RetrievalOptions(**common), mesh)
    assert {k: values[f"val/{k}"] for k in dual} == pytest.approx(dual)
    for query in shown[0].queries:  # the report marks what counted
        assert all(hit.right == (query.rank == at) for at, hit in enumerate(query.hits[: query.rank + 1]))

    values, shown = run(RerankOptions(**common, k_test=3, score="itm+itc"), mesh)
    want = {
        "val/": wanted(match + cosines() / TAU, group, 3, cosines()),
        "val/itm/": wanted(match, group, 3, cosines()),
        "val/dual/": dual,
    }
    for name, numbers in want.items():
        assert {k: values[name + k] for k in dual} == pytest.approx(numbers), name
    for query in shown[1].queries:
        assert all(hit.right == (query.rank == at) for at, hit in enumerate(query.hits[: query.rank + 1]))
    alone, _ = run(RerankOptions(**common, k_test=3), mesh)
    assert {k: alone[f"val/{k}"] for k in dual} == pytest.approx(want["val/itm/"]) and "val/itm/i2t/r@1" not in alone

    if mesh == MeshOptions(data=1):
        values, _ = run(LexicalOptions(**common, threshold=1e-9, top=()))
        assert {k: values[f"val/dense/{k.replace('/', '_')}"] for k in dual} == pytest.approx(dual)


def test_chance_and_group_stand_beside_the_numbers(shard):
    """R@K of chance is that of all ways to draw K items; folds average their own."""
    values, _ = run(RetrievalOptions(source=shard, captions=2, group="caption", ks=(1, 3), show=0))
    right = np.array([[RIGHT["caption"](i, *text) for text in TEXTS] for i in range(IMAGES)])
    for way, table in ("i2t", right), ("t2i", right.T):
        for k in (1, 3):
            draws = [[any(row[list(items)]) for items in combinations(range(len(row)), k)] for row in table]
            assert values[f"val/{way}/chance_r@{k}"] == pytest.approx(np.mean([np.mean(row) for row in draws]))
    assert values["val/grouped_by/caption"] == 9
    line = last_line(values)
    assert line.startswith("val (same caption right): image-to-text R@1/3 ") and line.count("(chance ") == 2
    split, _ = run(RetrievalOptions(source=shard, captions=1, group="class", folds=3, ks=(1,), show=0))
    assert split["val/i2t/chance_r@1"] == pytest.approx(np.mean([5 / 9, 3 / 9, 5 / 9]))
    plain, _ = run(RetrievalOptions(source=shard, captions=2, ks=(1,), show=0))
    assert not [k for k in plain if "chance" in k or "grouped" in k] and "chance" not in last_line(plain)


def test_more_than_all_items_holds_a_right_one():
    some = groups.Groups(np.array([[0], [1]]), np.array([0, 1]))
    assert set(groups.chance(some, (2, 10)).values()) == {1.0}


def test_a_group_that_samples_lack_is_named_before_anything_runs(shard):
    for group, message in (
        ("shade", "group is 'shade', a field that is missing in sample '000'"),
        ("odd", "group is 'odd', a field that is 1.5 in sample '007'"),
    ):
        for kind in (RetrievalOptions, RerankOptions, LexicalOptions):
            with pytest.raises(ValueError, match=rf"evals\.val: {message}"):
                evals.check({"val": kind(source=shard, group=group)}, DataOptions(image_size=8, threads=1, workers=0))


def test_a_sum_below_what_was_not_proposed_stays_above_it(shard):
    """Cosine/τ may reach -1000; a candidate still comes before every item that is none."""
    values, _ = run(RerankOptions(source=shard, captions=2, ks=KS, k_test=12, batch_size=4, show=0, score="itm+itc"), tau=-1e-3)
    match = tables()["match"][:IMAGES][:, [int(c) for _, c in TEXTS]]
    want = wanted(match - 1000 * cosines(), "", 12, cosines())
    assert {k: values[f"val/{k}"] for k in want} == pytest.approx(want)
    with pytest.raises(ValueError, match=r"score is 'itm\+itc', but the method of this run has no temperature"):
        run(RerankOptions(source=shard, score="itm+itc", show=0), tau=None)
    with pytest.raises(ValueError, match="score is 'itc'; it must be 'itm' or 'itm.itc'"):
        run(RerankOptions(source=shard, score="itc"))


@pytest.mark.parametrize("block", [5, 64])
def test_streamed_ranks_of_rows_with_several_groups(block):
    rng = np.random.default_rng(0)
    q, g = rng.normal(size=(21, 4)).astype(np.float32), rng.normal(size=(34, 4)).astype(np.float32)
    mine, theirs = rng.integers(-1, 6, (21, 2)), rng.integers(-1, 6, (34, 3))
    theirs[:, 1] = rng.integers(0, 6, 34)
    right = np.array([[bool({*a} & {*b} - {-1}) for b in theirs] for a in mine])
    np.testing.assert_array_equal(ranking.in_common(mine, theirs), right)
    exact = ranking.exact_ranks((q @ g.T).astype(float), right)
    for ours, want in zip(streamed.streamed_ranks(q, g, mine, theirs, make_mesh(MeshOptions()), block=block), exact, strict=True):
        np.testing.assert_array_equal(ours, want)
