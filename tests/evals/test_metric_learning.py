"""Metric-learning numbers against their definitions, written out."""

import itertools
import math

import numpy as np
import pytest

from jaxvl.evals import metric_learning as ml


def test_precisions_of_a_ranking_worked_by_hand() -> None:
    scores = np.array([[9.0, 8, 7, 6, 5], [1, 1, 1, 1, 1]])
    ranks, precisions = ml.by_label(scores, np.array([1, 7]), np.array([1, 0, 1, 1, 0]))
    assert ranks.stable.tolist() == [0, -1]
    wanted = [1, 2 / 3, (1 + 2 / 3) / 3, (1 + 2 / 3 + 3 / 4) / 3]
    np.testing.assert_allclose([p[0] for p in precisions], wanted, rtol=1e-15)
    assert all(np.isnan(p[1]) for p in precisions)


def test_a_query_is_not_its_own_neighbour() -> None:
    ranks, precisions = ml.by_label(np.eye(4) * 9, np.array([0, 0, 1, 1]))
    assert ranks.optimistic.tolist() == [0, 0, 0, 0] and ranks.pessimistic.tolist() == [2, 2, 2, 2]
    assert precisions.at_1.tolist() == [0, 1, 0, 0] or precisions.at_1.tolist() == [1, 1, 0, 0]
    with pytest.raises(ValueError, match="do not fit 4 queries and 3 items"):
        ml.by_label(np.eye(4), np.arange(4), np.arange(3))


def test_nmi_knows_sameness_and_independence() -> None:
    labels = np.array([0, 0, 1, 1, 2, 2])
    for mean in ("arithmetic", "geometric", "min", "max"):
        assert ml.nmi(labels, 5 - labels, mean) == pytest.approx(1)
        assert ml.ami(labels, 5 - labels, mean) == pytest.approx(1)
        assert ml.nmi(np.tile([0, 1], 4), np.repeat([0, 1], 4), mean) == pytest.approx(0, abs=1e-12)
        assert ml.nmi(labels, np.zeros(6, int), mean) == ml.ami(labels, np.zeros(6, int), mean) == 0
    assert ml.nmi(np.zeros(3, int), np.ones(3, int)) == ml.ami(np.zeros(3, int), np.ones(3, int)) == 1
    with pytest.raises(ValueError, match="mean='harmonic' must be one of"):
        ml.nmi(labels, labels, "harmonic")
    with pytest.raises(ValueError, match="two lists of one length"):
        ml.nmi(labels, labels[:3])


def test_the_chance_in_ami_is_the_mean_over_all_relabelings() -> None:
    labels, clusters = np.array([0, 0, 0, 1, 1, 2]), np.array([0, 1, 1, 1, 0, 0])
    information = lambda a, b: ml._mutual_information(ml._contingency(a, b))
    chance = np.mean([information(np.array(p), clusters) for p in itertools.permutations(labels.tolist())])
    h = lambda x: -sum(c / 6 * math.log(c / 6) for c in np.unique(x, return_counts=True)[1])
    wanted = (information(labels, clusters) - chance) / ((h(labels) + h(clusters)) / 2 - chance)
    assert ml.ami(labels, clusters) == pytest.approx(wanted, abs=1e-12)


def test_kmeans_finds_blobs_fills_empty_clusters_and_refuses_too_many() -> None:
    rng = np.random.default_rng(0)
    truth = np.repeat(np.arange(3), 20)
    points = np.eye(3)[truth] * 10 + 0.1 * rng.normal(size=(60, 3))
    start = np.array([[10.0, 0, 0], [0, 10, 0], [99, 99, 99]])  # no point is near the last
    clusters, inertia = ml.kmeans(points, start)
    assert ml.nmi(truth, clusters) == pytest.approx(1)
    centres = np.stack([points[truth == c].mean(0) for c in range(3)])
    assert inertia == pytest.approx(np.square(points - centres[truth]).sum())
    with pytest.raises(ValueError, match="2 points cannot fill 3 clusters"):
        ml.kmeans(points[:2], start)
