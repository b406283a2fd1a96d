"""Retrieval and clustering metrics: ranks exactly, numbers to 1e-12; the streamed route against the exact one."""

import warnings

import numpy as np

from jaxvl.evals import metric_learning, ranking
from jaxvl.evals.streamed import streamed_ranks
from jaxvl.mesh import MeshOptions, make_mesh
from tests.parity.case import Case, Check, has

equal = lambda actual, wanted, name: np.testing.assert_array_equal(actual, wanted, err_msg=name)


def close(actual, wanted, name, tol=1e-12):
    np.testing.assert_allclose(actual, wanted, rtol=0, atol=tol, err_msg=name)


def compare_ranks(case: Case, ranks: ranking.Ranks, ks: np.ndarray, prefix: str = "") -> None:
    for rule, rank in ranks._asdict().items():
        for what, got in (("rank", rank), ("recall", ranking.recall_at(rank, ks)), ("median_rank", ranking.median_rank(rank))):
            if (name := f"{prefix}{what}_{rule}") in case:
                close(got, case[name], name, 0 if what == "rank" else 1e-12)


def compare_streamed(
    scores: np.ndarray, query_group: np.ndarray, gallery_group: np.ndarray, ranks: ranking.Ranks, own: bool = False
) -> None:
    """The streamed route meets the scores themselves: against a gallery of unit vectors a row of scores is its own product.

    Scores that float32 cannot tell apart but float64 can (none, in most files) make a query's ranks incomparable.
    """
    small = scores.astype(np.float32)
    streamed = streamed_ranks(
        small, np.eye(scores.shape[1]), query_group, gallery_group, make_mesh(MeshOptions()), leave_one_out=own, block=16
    )
    fair = np.array([len(np.unique(a)) == len(np.unique(b)) for a, b in zip(small, scores, strict=True)])
    for rule in ranks._fields:
        equal(getattr(streamed, rule)[fair], getattr(ranks, rule)[fair], f"streamed {rule}")


def scored(case: Case, *embeddings: str) -> None:
    """What is evaluated are a file's scores, however they were made of the embeddings that it may hold besides: cosines, rounded or of a head."""
    for name in embeddings:
        assert case.get(name) is None or case[name].ndim == 2, name


def image_text(case: Case) -> None:
    scores, owner, ks = case["scores"], case["text_to_image"], case["ks"]
    scored(case, "image_embeddings", "text_embeddings")
    images = np.arange(len(scores))

    def both(scores: np.ndarray, owner: np.ndarray) -> tuple[ranking.Ranks, ranking.Ranks]:
        right = np.arange(len(scores))[:, None] == owner
        return ranking.exact_ranks(scores, right), ranking.exact_ranks(scores.T, right.T)

    def numbers(ranks: tuple[ranking.Ranks, ranking.Ranks]) -> dict[str, float]:
        with warnings.catch_warnings():  # the files about ties are there to have them
            warnings.simplefilter("ignore")
            return ranking.both_ways(*ranks, ks)

    i2t, t2i = both(scores, owner)
    compare_ranks(case, i2t, ks, "i2t_")
    compare_ranks(case, t2i, ks, "t2i_")
    compare_streamed(scores, images, owner, i2t)
    compare_streamed(scores.T, owner, images, t2i)
    if "rsum_stable" in case:
        close(numbers((i2t, t2i))["rsum"], case["rsum_stable"], "rsum", 1e-10)
    if {"folds", "fold_recalls"} <= set(case):
        cut = ranking.folds(owner, len(scores), int(case["folds"]))
        each = [numbers(both(scores[rows][:, texts], local)) for rows, texts, local in cut]
        recalls = lambda result: [result[f"{way}/r@{k}"] for way in ("i2t", "t2i") for k in ks]
        close([recalls(r) for r in each], case["fold_recalls"], "folds")
        if "fold_mean" in case:
            close(recalls(ranking.mean(each)), case["fold_mean"], "fold mean")


def metric_learning_retrieval(case: Case) -> None:
    scores, labels, ks = case["scores"], case["labels"], case["ks"]
    own = "gallery_labels" not in case
    gallery_labels = labels if own else case["gallery_labels"]
    scored(case, "embeddings", "gallery")
    ranks, precisions = metric_learning.by_label(scores, labels, None if own else gallery_labels)
    compare_ranks(case, ranks, ks)
    compare_streamed(scores, labels, gallery_labels, ranks, own)
    names = {
        "at_1": ("precision_at_1", "mean_precision_at_1", "lib_precision_at_1"),
        "r_precision": ("r_precision", "mean_r_precision", "lib_r_precision"),
        "ap_at_r": ("ap_at_r", "mean_ap_at_r", "lib_mean_average_precision_at_r"),
        "average_precision": ("average_precision_full", "", ""),
    }
    for field, (each, mean, library) in names.items():
        ours = getattr(precisions, field)
        for name, got, tol in (
            (each, ours, 1e-12),
            (mean, np.nanmean(ours), 1e-12),
            (library, np.nanmean(ours), 1e-6),
        ):  # the library is in float32
            if name in case:
                close(got, case[name], name, tol)


def agreement(case: Case) -> None:
    """NMI and AMI of two labelings, under whichever means the file gives."""
    for name in case:
        which, _, mean = name.partition("_")
        if which in ("nmi", "ami"):
            close(getattr(metric_learning, which)(case["labels"], case["clusters"], mean), case[name], name, 1e-10)


def kmeans(case: Case) -> None:
    clusters, inertia = metric_learning.kmeans(case["embeddings"], case["init"])
    equal(clusters, case["clusters"], "clusters")
    close(inertia, case["inertia"], "inertia", 1e-10)
    agreement(case)


CHECKS = {
    "image_text": Check(has("text_to_image", "i2t_rank_stable", "t2i_rank_stable"), image_text),
    "dml": Check(has("scores", "labels", "rank_stable", "ap_at_r"), metric_learning_retrieval),
    "kmeans": Check(has("embeddings", "init", "clusters", "inertia"), kmeans),
    "nmi": Check(
        lambda case: has("labels", "clusters")(case) and any(name.startswith(("nmi_", "ami_")) for name in case) and "init" not in case,
        agreement,
    ),
}
