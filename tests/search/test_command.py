"""`jaxvl search` from a saved run and a folder of pictures, shards or texts to what it prints, against vectors embedded by hand."""

import json
import re
import shutil

import numpy as np
import pytest
from runs import CAPTIONS, CLIP, LEXVLA, answer, make_pictures, make_run

from jaxvl import cli
from jaxvl.data.dataset import decode_options
from jaxvl.data.decode import decode_eval
from jaxvl.search import backends, build, model, query, store

PICTURES = 11


@pytest.fixture(scope="module")
def made(tmp_path_factory):
    """The runs, the pictures, a file of texts, and an index of each kind."""
    folder = tmp_path_factory.mktemp("search")
    runs = {"lexvla": make_run(folder / "lexvla", LEXVLA), "clip": make_run(folder / "clip", CLIP)}
    pictures = make_pictures(folder / "pictures", PICTURES)
    (folder / "texts.txt").write_text("\n".join([*CAPTIONS, "", "a red dog"]) + "\n")
    for name, run in runs.items():
        assert (
            cli.main(
                [
                    "search",
                    "index",
                    str(run),
                    str(pictures),
                    "--index",
                    str(folder / f"{name}.index"),
                    "--batch-size",
                    "8",
                    "--pruned",
                    "4",
                    "4",
                    "3",
                ]
            )
            == 0
        )
    return folder


@pytest.fixture(scope="module", autouse=True)
def opened_once():
    """A run is opened once: the runs do not change, and a method that is built anew is compiled anew."""
    held = {}

    def once(run, overrides=(), *, step=None, ema=False):
        assert step in (None, 3)
        key = (run, *overrides)
        if key not in held:
            held[key] = model.open_run(run, overrides, step=step, ema=ema)
        return held[key]

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(build, "open_run", once)
        patch.setattr(query, "open_run", once)
        yield


@pytest.fixture(scope="module")
def opened(made):
    return {name: model.open_run(made / name) for name in ("lexvla", "clip")}


def by_hand(opened, texts=(), images=()):
    """Embeddings of the method itself, of texts and of image files."""
    import jax

    from jaxvl.data.augment import preprocess

    m = opened.model
    with jax.set_mesh(m.mesh):
        if texts:
            return np.asarray(jax.jit(m.method.embed_text)(m.params, m.tokenizer.encode_batch(list(texts))))
        pixels = np.stack([decode_eval(path.read_bytes(), decode_options(m.data)) for path in images])
        return np.asarray(jax.jit(lambda params, x: m.method.embed_image(params, preprocess(x, None, m.augment)))(m.params, pixels))


def files(made):
    return sorted(p for p in (made / "pictures").rglob("*.png") if p.name != "99.png")


def test_pictures_asked_by_text(made, opened, capsys):
    """Hits, their order and scores are those of the method's own vectors; the words of each hit add up to its score."""
    assert cli.main(["search", "query", str(made / "lexvla.index"), "--text", "a red dog", "--k", "4", "--explain", "--json"]) == 0
    out = answer(capsys.readouterr().out)
    images, query = by_hand(opened["lexvla"], images=files(made)), by_hand(opened["lexvla"], texts=["a red dog"])[0]
    keep = lambda x: np.where(x > x.shape[-1] ** -0.5, x, 0)
    scores = keep(images) @ keep(query)
    order = np.argsort(-scores, kind="stable")[:4]
    assert [hit["name"] for hit in out["hits"]] == [str(files(made)[i]) for i in order]
    np.testing.assert_allclose([hit["score"] for hit in out["hits"]], scores[order], rtol=1e-4)
    pieces = opened["lexvla"].pieces
    for hit, i in zip(out["hits"], order, strict=True):
        assert sum(hit["words"].values()) == pytest.approx(hit["score"], rel=1e-5)
        assert {w: pytest.approx(x, rel=1e-3) for w, x in hit["words"].items()} == {
            pieces[j]: keep(images[i])[j] * keep(query)[j] for j in np.flatnonzero(keep(images[i]) * keep(query))
        }
    assert set(out["query"]["words"]) == {pieces[j] for j in np.flatnonzero(keep(query))}


@pytest.mark.parametrize("name", ["lexvla", "clip"])
def test_a_picture_finds_itself(made, name, tmp_path, capsys):
    asked = made / "pictures" / "deeper" / "01.png"
    assert cli.main(["search", "query", str(made / f"{name}.index"), "--image", str(asked), "--k", "99", "--json"]) == 0
    found = answer(capsys.readouterr().out)["hits"]
    assert {hit["name"] for hit in found} == set(map(str, files(made)))  # the broken one is not there
    assert [hit["score"] for hit in found] == sorted((hit["score"] for hit in found), reverse=True)
    if name == "clip":  # of unit norm; what is left of a lexical vector is not
        assert found[0]["name"] == str(asked) and found[0]["score"] == pytest.approx(1, abs=1e-5)
        (tmp_path / "a.jpg").write_bytes(b"\0\0\0\x18ftypheic\0\0\0\0mif1heic")
        assert cli.main(["search", "query", str(made / "clip.index"), "--image", str(tmp_path / "a.jpg")]) == 2
        assert "a.jpg cannot be decoded: heic: the image is HEIC, a format that is not read" in capsys.readouterr().err


def test_backends_agree_and_say_what_they_are(made, capsys):
    told = {}
    for backend in ("exact", "device", "two-stage"):
        assert cli.main(["search", "query", str(made / "lexvla.index"), "--text", "green tree", "--backend", backend, "--json"]) == 0
        told[backend] = answer(capsys.readouterr().out)
    names = lambda out: [hit["name"] for hit in out["hits"]]
    assert names(told["exact"]) == names(told["device"])
    measured = store.open_index(made / "lexvla.index").measured
    assert told["exact"]["quality"] == told["device"]["quality"] == "exact"
    assert (
        f"{measured['two-stage/recall@10']:.4f}" in told["two-stage"]["quality"]
        and f"measured on {PICTURES} items" in told["two-stage"]["quality"]
    )


def test_the_table_names_hits_and_words(made, capsys):
    assert (
        cli.main(["search", "query", str(made / "lexvla.index"), "--text", "a red dog", "--k", "2", "--explain", "--backend", "two-stage"])
        == 0
    )
    out = capsys.readouterr().out
    assert (
        "recall@10 against exact search" in out
        and ".png" in out
        and " + " in out
        and len([line for line in out.splitlines() if ".png" in line]) == 2
    )


@pytest.mark.parametrize("name", ["lexvla", "clip"])
def test_texts_of_a_file(made, opened, name, tmp_path, capsys):
    """A blank line is no item; lines of JSON are read as well."""
    lines = [json.dumps(c if i % 2 else {"caption": c}) for i, c in enumerate(CAPTIONS)]
    (tmp_path / "texts.jsonl").write_text("\n".join(lines))
    for source, count in ((made / "texts.txt", len(CAPTIONS) + 1), (tmp_path / "texts.jsonl", len(CAPTIONS))):
        out = tmp_path / f"{source.suffix[1:]}.index"
        assert cli.main(["search", "index", str(made / name), str(source), "--index", str(out), "--batch-size", "8"]) == 0
        index = store.open_index(out)
        assert index.total == count and index.name(1) == CAPTIONS[1] and index.meta["what"] == "texts" and index.step == 3
    rows = backends.vectors(index)
    x = by_hand(opened[name], texts=CAPTIONS)
    want = np.where(x > x.shape[1] ** -0.5, x, 0) if name == "lexvla" else x
    np.testing.assert_allclose(rows.toarray() if name == "lexvla" else rows, want, atol=2e-6)


@pytest.mark.parametrize(
    ("cleaning", "asked"),
    [
        ("plain", ["a  red\t dog ", "\ufeffa red dog", "a\xa0red\u2003dog", "\u200ba red dog\0"]),
        ("albef", ["a red dog", "A red dog!", "\ufeffA  Red-dog."]),
    ],
)
def test_queries_are_cleaned_as_the_captions_were(made, tmp_path, capsys, cleaning, asked):
    """Whatever its white space, and with ALBEF's cleaning its case and punctuation, a text finds itself; of the items as of the queries."""
    (tmp_path / "texts.jsonl").write_text("\n".join(map(json.dumps, ["a green tree", *asked])))
    how = f"--config.data.cleaning={cleaning}"
    assert cli.main(["search", "index", str(made / "clip"), str(tmp_path / "texts.jsonl"), "--index", str(tmp_path / "index"), how]) == 0
    for text in asked:
        capsys.readouterr()
        assert cli.main(["search", "query", str(tmp_path / "index"), "--text", text, "--k", str(len(asked)), "--json"]) == 0
        assert [hit["score"] for hit in answer(capsys.readouterr().out)["hits"]] == pytest.approx([1] * len(asked), abs=1e-5)
    assert cli.main(["search", "query", str(tmp_path / "index"), "--text", " \ufeff"]) == 2
    assert "cannot be embedded: cleaned as the captions were" in capsys.readouterr().err


def test_shards(made, tmp_path, capsys):
    out = tmp_path / "index"
    assert (
        cli.main(
            [
                "search",
                "index",
                str(made / "lexvla"),
                "glyphs://val-seen?size=10",
                "--index",
                str(out),
                "--active",
                "3",
                "--batch-size",
                "8",
            ]
        )
        == 0
    )
    index = store.open_index(out)
    assert index.total == 10 and (np.diff(backends.vectors(index).indptr) == 3).all() and ".tar/" in index.name(9)


def test_an_export_embeds_as_its_run_did(made, tmp_path, capsys):
    assert cli.main(["export", str(made / "lexvla"), "--format", "safetensors", "--out", str(tmp_path / "model")]) == 0
    assert (
        cli.main(
            ["search", "index", str(tmp_path / "model"), str(made / "pictures"), "--index", str(tmp_path / "index"), "--batch-size", "8"]
        )
        == 0
    )
    ours, theirs = (store.open_index(folder) for folder in (made / "lexvla.index", tmp_path / "index"))
    np.testing.assert_allclose(backends.vectors(theirs).toarray(), backends.vectors(ours).toarray(), atol=1e-6)
    capsys.readouterr()
    assert cli.main(["search", "query", str(tmp_path / "index"), "--text", "dog", "--json"]) == 0
    assert answer(capsys.readouterr().out)["hits"]
    with pytest.raises(ValueError, match="an export, which has one set of weights"):
        model.open_run(tmp_path / "model", step=3)
    assert cli.main(["search", "index", str(made / "pictures"), str(made / "pictures"), "--index", str(tmp_path / "no")]) == 2
    assert "has no config.json" in capsys.readouterr().err


def test_a_damaged_export_is_refused_by_name(made, tmp_path):
    out = tmp_path / "model"
    assert cli.main(["export", str(made / "lexvla"), "--format", "safetensors", "--out", str(out)]) == 0
    for name, damage, words in (
        ("tokenizer/tokenizer.json", lambda data: data.replace(b'"dog"', b'"gdo"', 1), "is not the file that the export was saved with"),
        ("tokenizer/lexicon.json", None, "is missing"),
        ("config.json", lambda data: data.replace(b"0.48145466", b"0.5"), "is not what was exported"),
        ("model.safetensors", lambda data: data[:-1] + bytes([data[-1] ^ 1]), "is not what was exported"),
    ):
        whole = (out / name).read_bytes()
        if damage is None:
            (out / name).unlink()
        else:
            assert damage(whole) != whole
            (out / name).write_bytes(damage(whole))
        with pytest.raises(ValueError, match=rf"{re.escape(str(out / name))} {words}"):
            model.open_run(out)
        (out / name).write_bytes(whole)
    assert model.open_run(out).identity.step == 3


def test_another_run_or_lexicon_is_refused(made, tmp_path, capsys):
    """Other parameters, another step, and other words, each by name."""
    other = make_run(tmp_path / "other", LEXVLA, seed=1)
    ask = lambda run: (
        cli.main(["search", "query", str(made / "lexvla.index"), "--text", "dog", "--run", str(run)]),
        capsys.readouterr().err,
    )
    status, said = ask(other)
    assert status == 2 and "the parameters are others" in said
    words = make_run(tmp_path / "words", {**LEXVLA, "tokenizer": {**LEXVLA["tokenizer"], "lexicon": "ascii_any"}})
    status, said = ask(words)
    assert status == 2 and "its coordinates are other words" in said and "Give the run" in said
    status, said = ask(made / "clip")
    assert status == 2 and "the recipe differs" in said
    assert cli.main(["search", "query", str(made / "clip.index"), "--text", "dog", "--explain"]) == 2
    assert "--explain tells scores by words" in capsys.readouterr().err
    assert cli.main(["search", "query", str(made / "clip.index"), "--text", "dog", "--backend", "faiss"]) == 2
    assert "was made without faiss" in capsys.readouterr().err


@pytest.mark.parametrize("what", ["cut", "changed", "gone", "manifest"])
def test_a_damaged_index_is_refused(made, tmp_path, what, capsys):
    copy = tmp_path / "index"
    shutil.copytree(made / "lexvla.index", copy)
    victim = copy / ("manifest.json" if what == "manifest" else "rows.data")
    content = bytearray(victim.read_bytes())
    content[100] ^= 1
    victim.write_bytes(content[:-4] if what == "cut" else content)
    if what == "gone":
        victim.unlink()
    assert cli.main(["search", "query", str(copy), "--text", "dog"]) == 2
    said = capsys.readouterr().err
    assert "damaged" in said and victim.name in said
    assert {"cut": "bytes, saved with", "changed": "sha256", "gone": "cannot be read", "manifest": "own sha256"}[what] in said


def test_what_cannot_be_indexed_leaves_nothing(made, tmp_path, capsys):
    (tmp_path / "empty").mkdir()
    (tmp_path / "bad.jsonl").write_text('"a dog"\n{"name": 3}\n')
    (tmp_path / "latin.txt").write_bytes("a dog\n\na caf\u00e9".encode("latin-1"))
    (tmp_path / "cut.jsonl").write_text('"a dog"\n"a c')
    for source, extra, said in (
        ("empty", (), "neither images nor"), ("bad.jsonl", (), "bad.jsonl:2 has no text"), ("latin.txt", (), "latin.txt:3 is not UTF-8"), ("cut.jsonl", (), "cut.jsonl:2 is no JSON"), ("bad.jsonl", ("--pruned", "1", "0", "1"), "keeps 0 query"),
    ):  # fmt: skip
        assert cli.main(["search", "index", str(made / "lexvla"), str(tmp_path / source), "--index", str(tmp_path / "index"), *extra]) == 2
        assert said in capsys.readouterr().err
    assert (
        cli.main(["search", "index", str(made / "clip"), str(made / "texts.txt"), "--index", str(tmp_path / "index"), "--active", "3"]) == 2
    )
    assert "dense" in capsys.readouterr().err
    assert sorted(p.name for p in tmp_path.iterdir()) == ["bad.jsonl", "cut.jsonl", "empty", "latin.txt"]
    assert cli.main(["search", "index", str(made / "clip"), str(made / "texts.txt"), "--index", str(made / "clip.index")]) == 2
    assert "exists" in capsys.readouterr().err
    assert cli.main(["search", "query", str(tmp_path), "--text", "dog"]) == 2
    assert "is no index" in capsys.readouterr().err
