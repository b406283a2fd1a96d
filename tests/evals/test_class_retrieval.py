"""Streamed metric-learning numbers against those of the whole score matrix."""

import numpy as np
import pytest

from jaxvl.evals import class_retrieval as cr, metric_learning as ml
from jaxvl.evals.ranking import recall_at
from jaxvl.mesh import MeshOptions, make_mesh


@pytest.fixture(scope="module")
def mesh():
    return make_mesh(MeshOptions())


def points(seed, rows, width=5):
    x = np.random.default_rng(seed).normal(size=(rows, width))
    return (x / np.linalg.norm(x, axis=1, keepdims=True)).astype(np.float32)


@pytest.mark.parametrize("own", [True, False])
def test_numbers_are_those_of_the_whole_matrix(own, mesh):
    rng = np.random.default_rng(0)
    x, y = points(1, 41), points(2, 30)
    x[5:9] = x[4]  # equal scores, and queries that are not first among their own neighbours
    labels, item_labels = rng.integers(0, 9, 41), rng.integers(0, 11, 30)
    labels[0] = 77  # a lone query
    scores = (x @ (x if own else y).T).astype(np.float32)
    with np.errstate(all="ignore"):
        ranks, wanted = ml.by_label(scores, labels, None if own else item_labels)
    got = cr.measure(x, labels, None if own else y, None if own else item_labels, (1, 3), mesh, block=16)
    means = {"r_precision": np.nanmean(wanted.r_precision), "map@r": np.nanmean(wanted.ap_at_r), "lone": (ranks.stable < 0).sum()}
    recalls = dict(zip(("r@1", "r@3"), recall_at(ranks.stable, (1, 3)), strict=True))
    assert got == pytest.approx(means | recalls, abs=1e-12)
    places = cr.places(x, labels, x if own else y, labels if own else item_labels, mesh, own=own, block=16)
    np.testing.assert_allclose(places.ap_at_r, wanted.ap_at_r, atol=1e-12)
    np.testing.assert_allclose(places.r_precision, wanted.r_precision, atol=1e-12)


def test_nothing_but_lone_queries_has_no_numbers(mesh):
    got = cr.measure(points(0, 4), np.arange(4), None, None, (1,), mesh, block=16)
    assert np.isnan([got["r@1"], got["map@r"]]).all() and got["lone"] == 4


def test_clusters_are_lloyds_from_the_seeded_start(mesh):
    x, labels = points(3, 29), np.random.default_rng(1).integers(0, 6, 29)
    start = x[np.sort(np.random.default_rng(5).choice(29, 6, replace=False))]
    for mean in ("arithmetic", "geometric"):
        want = ml.nmi(labels, ml.kmeans(x, start)[0], mean)
        assert cr.clustered(x, labels, mean, 5, mesh) == pytest.approx(want, abs=1e-12)


def test_queries_and_gallery_have_one_list_of_classes():
    one, other = cr.same_numbers([("b", "c"), ("a", "b", "c")], [np.array([0, 1]), np.array([0, 1, 2])])
    assert one[0] == other[1] and one[1] == other[2] and other[0] not in one
    with pytest.raises(ValueError, match="names and those of gallery numbers"):
        cr.same_numbers([("b",), ()], [np.zeros(1, int)] * 2)
