"""Re-ranking from shards to numbers with a method whose every score is known, against the same in plain numpy."""

import io
import itertools
import json
import tarfile
from pathlib import Path

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from jax.sharding import PartitionSpec as P
from PIL import Image

from jaxvl import evals
from jaxvl.data.augment import AugmentOptions
from jaxvl.data.stream import DataOptions
from jaxvl.evals import ranking, rerank
from jaxvl.evals.rerank import Candidates, RerankOptions
from jaxvl.mesh import MeshOptions, make_mesh
from jaxvl.methods.method import Method, PairScore, unit

pytestmark = [pytest.mark.filterwarnings("ignore:1 of 21 samples"), pytest.mark.filterwarnings("ignore:.*equal scores")]
SAMPLES, BROKEN, WORDS = 21, 4, 64  # image 4 cannot be decoded; captions are numbers
IMAGES = np.array([i for i in range(SAMPLES) if i != BROKEN])
OWNER = np.repeat(np.arange(len(IMAGES)), [1 + i % 3 for i in IMAGES])
NUMBERS = np.concatenate([[3 * i + c for c in range(1 + i % 3)] for i in IMAGES])


class Numbers:
    """Captions are numbers."""

    context_length = 3

    def encode_batch(self, captions: list[str]) -> np.ndarray:
        return np.array([[int(caption) + 1, 0, 0] for caption in captions], np.int32)


def tables(seed: int = 0) -> dict[str, np.ndarray]:
    """Embeddings of images and words, and a match logit of every image with every word, none of it related to the others."""
    rng = np.random.default_rng(seed)
    return {"image": rng.standard_normal((32, 6)), "word": rng.standard_normal((WORDS, 6)), "match": rng.standard_normal((32, WORDS))}


def method() -> Method:
    level = lambda images: jnp.round(images.mean((1, 2))[:, 0] * 255 / 8).astype(jnp.int32)

    def score(params, images, texts, source):
        groups, rows = source.shape
        mine = images["row"][0].reshape(groups, -1, WORDS)  # an image of another group cannot be reached
        return jnp.take_along_axis(mine[jnp.arange(groups)[:, None], source].reshape(groups * rows, WORDS), texts["word"][:, None], 1)[:, 0]

    def flops(height, width, length):
        assert (height, width, length) == (8, 8, 3)
        return {"image_tower": 1e9, "text_tower": 1e6, "keys_values": 4e9, "pair": 1e9}

    face = PairScore(
        image_side=lambda params, images: {"row": params["match"][level(images)][None]},
        text_side=lambda params, tokens: {"word": tokens[:, 0] - 1}, score=score, flops=flops,
    )  # fmt: skip
    nothing = lambda *_: None
    embed_image = lambda params, images: unit(params["image"][level(images)])
    embed_text = lambda params, tokens: unit(params["word"][tokens[:, 0] - 1])
    return Method(nothing, nothing, nothing, nothing, nothing, embed_image, embed_text, nothing, ((".*", P()),), score_pair=face)


@pytest.fixture(scope="module")
def shard(tmp_path_factory: pytest.TempPathFactory) -> str:
    path = tmp_path_factory.mktemp("shards") / "val-0000.tar"
    with tarfile.open(path, "w") as tar:
        for i in range(SAMPLES):
            out = io.BytesIO()
            Image.new("RGB", (8, 8), (i * 8, 0, 0)).save(out, "PNG")
            captions = [str(3 * i + c) for c in range(1 + i % 3)]
            picture = out.getvalue() if i != BROKEN else out.getvalue()[:50]
            for suffix, data in ("png", picture), ("txt", captions[0].encode()), ("json", json.dumps({"captions": captions}).encode()):
                member = tarfile.TarInfo(f"{i:03d}.{suffix}")
                member.size = len(data)
                tar.addfile(member, io.BytesIO(data))
    return str(path)


def run(entry: RerankOptions, tmp_path: Path, mesh: MeshOptions = MeshOptions(), params: dict | None = None) -> tuple[dict, list]:
    options = DataOptions(image_size=8, cache=str(tmp_path), threads=1, workers=0)
    augment = AugmentOptions(mean=(0.0,) * 3, std=(1.0,) * 3)
    with jax.set_mesh(make_mesh(mesh)):
        return evals.run({"val": entry}, METHOD, jax.tree.map(jnp.float32, params or tables()), Numbers(), options, augment)


METHOD = method()


def reference(k: int, match: np.ndarray) -> dict[str, float]:
    """Every query by itself: its k nearest by cosine, sorted by match, the others level and last."""
    known = {name: table.astype(np.float32) for name, table in tables().items()}
    images, texts = (x / np.linalg.norm(x, axis=1, keepdims=True) for x in (known["image"][IMAGES], known["word"][NUMBERS]))
    logits = match.astype(np.float32)[IMAGES][:, NUMBERS]
    right = np.arange(len(IMAGES))[:, None] == OWNER
    out = {}
    for way, cosine, score, correct in ("i2t", images @ texts.T, logits, right), ("t2i", texts @ images.T, logits.T, right.T):
        ranks = []
        for row, value, answers in zip(cosine, score, correct, strict=True):
            proposed = sorted(range(len(row)), key=lambda j: (-row[j], j))[:k]
            total = [value[j] if j in proposed else -100.0 for j in range(len(row))]
            order = sorted(range(len(row)), key=lambda j: (-total[j], j))
            ranks.append(min(order.index(j) for j in np.flatnonzero(answers)))
        out |= {f"{way}/r@{n}": float(np.mean(np.array(ranks) < n)) for n in (1, 2, 5)}
        out[f"{way}/median_rank"] = float(np.median(ranks)) + 1
    return out


@pytest.mark.parametrize("mesh", [MeshOptions(), MeshOptions(data=2, fsdp=2, tensor=2), MeshOptions(data=1, fsdp=2, tensor=4)], ids=str)
@pytest.mark.parametrize("k, batch, pairs", [(4, 8, 3), (100, 16, 64)])
def test_the_same_as_every_query_by_itself(shard, tmp_path, capsys, mesh, k, batch, pairs):
    entry = RerankOptions(source=shard, captions=3, ks=(1, 2, 5), k_test=k, batch_size=batch, pairs=pairs, show=3)
    values, galleries = run(entry, tmp_path, mesh)
    want = reference(k, tables()["match"])
    assert {name: values[f"val/{name}"] for name in want} == pytest.approx(want)
    assert values["val/rsum"] == pytest.approx(100 * sum(v for n, v in want.items() if "r@" in n))
    assert set(values) == {f"val/{dual}{n}" for dual in ("", "dual/") for n in [*want, "rsum"]}
    assert "pairs of 20 images: " in (said := capsys.readouterr().err) and "6 (" in said  # GFLOPs with the towers for every pair
    text, picture = galleries
    best = text.queries[0].hits
    assert len(best) == min(5, k) and all(a.score >= b.score for a, b in itertools.pairwise(best))
    assert best[0].right == (text.queries[0].rank == 0) and len(picture.queries) == 3


def test_level_scores_go_to_the_lowest_index(shard, tmp_path):
    level = tables() | {"match": np.zeros((32, WORDS))}
    values, _ = run(RerankOptions(source=shard, captions=3, ks=(1, 2, 5), k_test=6, batch_size=8, show=0), tmp_path, params=level)
    want = reference(6, level["match"])
    assert {name: values[f"val/{name}"] for name in want} == pytest.approx(want)


def test_images_pass_in_tiles_that_fit(shard, tmp_path, monkeypatch):
    """An image is projected once, whatever fits; one that does not fit at all is refused."""
    sides: list[int] = []
    whole = rerank._image_side
    monkeypatch.setattr(
        rerank, "_image_side", lambda params, batch, **more: sides.append(len(batch["image"])) or whole(params, batch, **more)
    )
    entry = RerankOptions(source=shard, captions=3, ks=(1, 2, 5), k_test=4, batch_size=8, show=0)
    every, _ = run(entry, tmp_path)
    assert sides == [8, 8, 8]
    sides.clear()
    image = 4 * WORDS / 2**30
    few, _ = run(entry._replace(cache_gb=2.5 * image), tmp_path, MeshOptions(data=2, fsdp=1, tensor=4))
    assert sides == [4] * 6 and few == every  # two on each of two devices
    with pytest.raises(ValueError, match=r"evals\.val: cache_gb .* one image take"):
        run(entry._replace(cache_gb=image / 2), tmp_path)


def test_what_a_pair_costs():
    flops = {"pair": 1.0, "keys_values": 4.0, "image_tower": 20.0, "text_tower": 2.0}
    assert rerank.pair_costs(flops, pairs=8) == (1.5, 5.0, 27.0)


def test_schedule_meets_every_pair_once_in_its_group():
    rng = np.random.default_rng(0)
    for groups, size, count in ((1, 5, 3), (4, 2, 3), (3, 4, 100)):
        local = np.sort(rng.integers(0, groups * size, 37))
        steps = list(rerank.schedule(local, size, groups, count))
        assert all(step.shape == (groups, count) for step in steps)
        met = np.concatenate([step.ravel() for step in steps])
        assert sorted(met[met >= 0]) == list(range(37))
        for step in steps:
            group, _ = np.nonzero(step >= 0)
            np.testing.assert_array_equal(local[step[step >= 0]] // size, group)


def test_ranks_in_blocks_are_those_of_the_whole_matrix():
    rng = np.random.default_rng(0)
    queries, items, k = 600, 40, 7
    chosen = np.argsort(rng.random((queries, items)), 1)[:, :k]
    scores = rng.integers(-2, 3, (queries, k)).astype(np.float32)  # with ties
    dense = np.full((queries, items), -100.0, np.float32)
    np.put_along_axis(dense, chosen, scores, 1)
    own, groups = rng.integers(0, 20, queries), rng.integers(0, 20, items)
    want = ranking.exact_ranks(dense, own[:, None] == groups)
    got = rerank.candidate_ranks(Candidates(chosen, scores), own, groups)
    for name in want._fields:
        np.testing.assert_array_equal(getattr(got, name), getattr(want, name))


def test_what_cannot_be_is_named(shard, tmp_path):
    for change in ({"k_test": 0}, {"pairs": 0}, {"cache_gb": 0.0}, {"ks": ()}):
        with pytest.raises(ValueError, match=f"evals.val: {next(iter(change))} is"):
            run(RerankOptions(source=shard, **change), tmp_path)
    with pytest.raises(ValueError, match=r"config\.evals\.val\.kind is 'rerank', which needs a method with score_pair; clip has none"):
        evals.suits({"val": RerankOptions()}, "clip", METHOD._replace(score_pair=None))
    nan = tables() | {"match": np.full((32, WORDS), np.nan)}
    with pytest.raises(ValueError, match="NaN"):
        run(RerankOptions(source=shard, batch_size=8, show=0), tmp_path, params=nan)
