"""Captions in, ids out: what is cleaned, refused, kept and written."""

import json
import pickle
import random
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest
from hypothesis import HealthCheck, given, settings, strategies as st

from jaxvl import config
from jaxvl.data import text
from jaxvl.data.text import TokenizerOptions, Uncaptioned, clean_caption, load_tokenizer, prompts, train_tokenizer
from jaxvl.parts import assemble
from tests import tiny_config

CAPTIONS = ["A small red boat on the lake.", "two boats, one lake", "the old man and the sea", "Ein Bär läuft", "猫が眠る"] * 20
OPTIONS = TokenizerOptions(vocab_size=512, context_length=16)


@pytest.fixture(scope="module")
def bpe():
    return train_tokenizer(CAPTIONS, OPTIONS)


@pytest.mark.parametrize(
    "raw, want",
    [
        (b"\xef\xbb\xbfa boat\r\n", "a boat"),
        (b"  a\tboat\n\n on  a\x0b lake ", "a boat on a lake"),
        (b"a\0boat\0\0", "a boat"),
        ("Bär\u200b\u00a0 läuft".encode(), "Bär läuft"),
        ("a boat", "a boat"),
        (b"x" * 1_000_000, "x" * (1 << 14)),
        (("ä" * 500_000).encode(), "ä" * (1 << 13)),
        (("x" + "猫" * 500_000), "x" + "猫" * 5461),
        (b"good" + b" " * (1 << 14) + b"\xff", "good"),
    ],
)
def test_captions_are_cleaned(raw, want):
    assert clean_caption(raw) == want


@pytest.mark.parametrize(
    "raw, reason",
    [
        (b"", "blank"),
        (b" \r\n\t", "blank"),
        (b"\xef\xbb\xbf\0\0", "blank"),
        ("\u200b\u00a0", "blank"),
        (b"caf\xe9", "undecodable"),
        (b"\xff\xfea\0 \0b\0", "undecodable"),
        (b"x" * 20_000 + b"\xff", None),
        (b"\xff" + b"x" * 1_000_000, "undecodable"),
        (b"x" * ((1 << 14) - 4) + b"\xff" + b"x" * 9, "undecodable"),
        ("half a pair \ud83d", "undecodable"),
    ],
)
def test_captions_without_text_are_refused(raw, reason):
    if reason is None:
        assert clean_caption(raw)
        return
    with pytest.raises(Uncaptioned) as error:
        clean_caption(raw)
    assert error.value.reason == reason


@settings(deadline=None)
@given(st.one_of(st.binary(max_size=300), st.text(st.characters(), max_size=300)))
def test_any_caption_is_clean_or_refused(raw):
    try:
        clean = clean_caption(raw)
    except Uncaptioned as error:
        assert error.reason in ("blank", "undecodable")
    else:
        assert clean and clean == clean_caption(clean) and "\0" not in clean and clean.split() == clean.split(" ")


def test_rows_begin_end_and_are_padded(bpe):
    tokens = bpe.encode_batch(["a boat", "", "boat " * 99])
    assert tokens.shape == (3, 16) and tokens.dtype == np.int32
    assert (tokens[:, 0] == bpe.bos).all() and tokens[1, 1] == bpe.eos and (tokens[1, 2:] == 0).all()
    assert tokens[2, -1] == bpe.eos and (tokens[2] != 0).all()  # cut, with its end
    assert [list(row).count(bpe.eos) for row in tokens] == [1, 1, 1]
    assert len({0, bpe.bos, bpe.eos}) == 3 and tokens.max() < bpe.vocab_size
    assert bpe.encode_batch([]).shape == (0, 16)


@settings(deadline=None, max_examples=60, suppress_health_check=[HealthCheck.function_scoped_fixture])
@given(st.lists(st.text(max_size=40), min_size=1, max_size=5))
def test_a_batch_is_its_rows_and_nothing_is_unknown(bpe, captions):
    tokens = bpe.encode_batch(captions)
    for caption, row in zip(captions, tokens, strict=True):
        np.testing.assert_array_equal(bpe.encode_batch([caption])[0], row)
        length = np.count_nonzero(row)
        assert (row[:length] != 0).all() and row[length - 1] == bpe.eos
    assert (bpe.encode_batch(["A BOAT"]) == bpe.encode_batch(["a boat"])).all()


def test_text_comes_back(bpe):
    captions = ["the old man and the sea", "ein bär läuft", "猫が眠る"]
    wide = train_tokenizer(CAPTIONS, OPTIONS._replace(context_length=64))
    assert [wide.decode(row) for row in wide.encode_batch(captions)] == captions


def test_training_depends_on_the_captions_alone(bpe, tmp_path):
    shuffled = random.Random(1).sample(CAPTIONS, len(CAPTIONS))
    bpe.save(tmp_path / "a")
    train_tokenizer(iter(shuffled), OPTIONS).save(tmp_path / "b")
    program = (
        "from tests.data.test_text import *\n"
        f"train_tokenizer(CAPTIONS, OPTIONS).save({str(tmp_path / 'c')!r})"
    )  # another process has other hash seeds
    subprocess.run([sys.executable, "-c", program], check=True, timeout=60, cwd=Path(__file__).parents[2])
    first, *others = [(tmp_path / x / "tokenizer.json").read_bytes() for x in "abc"]
    assert all(other == first for other in others)
    few = train_tokenizer(CAPTIONS, OPTIONS._replace(captions=1))
    assert few.vocab_size < bpe.vocab_size


def test_a_saved_tokenizer_is_the_same_here_and_in_transformers(bpe, tmp_path):
    bpe.save(tmp_path)
    want = bpe.encode_batch(CAPTIONS[:5])
    again = load_tokenizer(OPTIONS, tmp_path)
    np.testing.assert_array_equal(again.encode_batch(CAPTIONS[:5]), want)
    np.testing.assert_array_equal(pickle.loads(pickle.dumps(again)).encode_batch(CAPTIONS[:5]), want)  # for worker processes
    assert (again.bos, again.eos, again.vocab_size, again.offset) == (bpe.bos, bpe.eos, bpe.vocab_size, 0)
    from transformers import AutoTokenizer

    theirs = AutoTokenizer.from_pretrained(tmp_path)
    np.testing.assert_array_equal(theirs(CAPTIONS[:5], padding="max_length", truncation=True, max_length=16).input_ids, want)
    named = load_tokenizer(OPTIONS._replace(name=str(tmp_path)))
    np.testing.assert_array_equal(named.encode_batch(CAPTIONS[:5]), want)


def _template(single, *specials):
    from tokenizers import processors

    return lambda ids: processors.TemplateProcessing(single, None, [(token, ids[token]) for token in specials])


def _pair(kind):
    from tokenizers import processors

    return lambda ids: getattr(processors, kind)(("[SEP]", ids["[SEP]"]), ("[CLS]", ids["[CLS]"]))


def _bytes(_):
    from tokenizers import processors

    return processors.ByteLevel()


CLS = {"cls_token": "[CLS]", "sep_token": "[SEP]", "pad_token": "[PAD]"}
BOTH = {"bos_token": "<s>", "eos_token": "</s>"}
STYLES = {
    "clip": ({**BOTH, "pad_token": "</s>"}, _template("<s> $A </s>", "<s>", "</s>")), "bert": (CLS, _pair("BertProcessing")), "roberta": (CLS, _pair("RobertaProcessing")),
    "llama": (BOTH, _template("<s> $A", "<s>")), "gpt2": ({"bos_token": "</s>", "eos_token": "</s>"}, _bytes), "none at all": (BOTH, None),
    "siglip2": ({**BOTH, "pad_token": "[PAD]"}, _template("$A </s>", "</s>")), "t5": ({"eos_token": "</s>", "pad_token": "[PAD]"}, _template("$A </s>", "</s>")),
    "nllb": (BOTH, _template("<s> [CLS] $A </s> [SEP]", "<s>", "[CLS]", "</s>", "[SEP]")),
}  # fmt: skip


def style_of(style, folder):
    """A small tokenizer with the special tokens and the template of a published one, and its vocabulary."""
    from tokenizers import Tokenizer, models, pre_tokenizers
    from transformers import PreTrainedTokenizerFast

    specials, processor = STYLES[style]
    words = ["!", "a", "boat", "<unk>", *BOTH.values(), *CLS.values()]
    order = [specials["pad_token"], *words] if specials.get("pad_token") == "[PAD]" else words
    vocabulary = {token: i for i, token in enumerate(dict.fromkeys(order))}
    backend = Tokenizer(models.WordLevel(vocabulary, unk_token="<unk>"))
    backend.pre_tokenizer = pre_tokenizers.Whitespace()
    if processor:
        backend.post_processor = processor(vocabulary)
    PreTrainedTokenizerFast(tokenizer_object=backend, **specials).save_pretrained(folder)
    return vocabulary


@pytest.mark.parametrize("style", STYLES)
def test_special_tokens_are_where_the_tokenizers_own_template_puts_them(style, tmp_path):
    """The ids are those of transformers, moved up where 0 is no padding: published tokenizers pad with EOS, with 0, or with nothing."""
    from transformers import AutoTokenizer

    vocabulary = style_of(style, tmp_path)
    found, theirs = load_tokenizer(OPTIONS._replace(name=str(tmp_path), context_length=7)), AutoTokenizer.from_pretrained(tmp_path)
    padded = STYLES[style][0].get("pad_token") == "[PAD]"
    assert found.offset == (not padded) and found.vocab_size == len(vocabulary) + found.offset
    captions = ["! a boat", "a", "boat " * 9, "x"]
    want = [[i + found.offset for i in theirs(caption, truncation=True, max_length=7).input_ids] for caption in captions]
    np.testing.assert_array_equal(found.encode_batch(captions), [row + [0] * (7 - len(row)) for row in want])
    assert found.ends == (style not in ("llama", "gpt2", "none at all"))
    found.save(tmp_path / "run")
    again = load_tokenizer(OPTIONS._replace(context_length=7), tmp_path / "run")
    np.testing.assert_array_equal(again.encode_batch(captions), found.encode_batch(captions))
    bare = load_tokenizer(OPTIONS._replace(name=str(tmp_path), context_length=7, end=False))
    assert not (bare.encode_batch(captions) == bare.eos).any() and not bare.ends


@pytest.mark.parametrize("style, change", [("gpt2", {}), ("llama", {}), ("clip", {"end": False})])
def test_a_tower_that_pools_at_an_end_needs_captions_that_have_one(style, change, tmp_path):
    style_of(style, tmp_path)
    tokenizer = load_tokenizer(OPTIONS._replace(name=str(tmp_path), context_length=7, **change))
    recipe = config.read(tiny_config.get_config())
    with pytest.raises(ValueError, match=r"config.text.pool is 'eos', and captions end in no EOS.*set config.text.pool to 'last'"):
        assemble(recipe, tokenizer)
    assemble(recipe._replace(text=recipe.text._replace(pool="last")), tokenizer)


def test_a_template_that_does_more_than_put_tokens_around_a_text_is_refused(tmp_path):
    from tokenizers import processors

    style_of("bert", tmp_path)
    path = tmp_path / "tokenizer.json"
    body = json.loads(path.read_text())
    twice = processors.TemplateProcessing("[CLS] $A [SEP]", None, [("[CLS]", body["model"]["vocab"]["[CLS]"]), ("[SEP]", 2)])
    body["post_processor"] = json.loads(twice.__getstate__())
    body["post_processor"]["single"].pop(1)  # the text itself
    path.write_text(json.dumps(body))
    with pytest.raises(ValueError, match="post-processor makes"):
        load_tokenizer(OPTIONS._replace(name=str(tmp_path)))


POINTER = "version https://git-lfs.github.com/spec/v1\noid sha256:01\nsize 5\n"


@pytest.mark.parametrize("name, damage, words", [
    ("tokenizer.json", POINTER, "a Git LFS pointer"), ("tokenizer.json", "{", "cannot be opened"), ("tokenizer.json", "", "is empty"),
    ("tokenizer_config.json", '{"tokenizer_class": "X", "auto_map": {"AutoTokenizer": ["evil.X", null]}}', "code of its own, which is never run"),
])  # fmt: skip
def test_a_folder_that_is_no_tokenizer_is_one_sentence_and_its_code_is_never_run(name, damage, words, tmp_path):
    style_of("bert", tmp_path)
    (tmp_path / name).write_text(damage)
    (tmp_path / "evil.py").write_text(f"open({str(tmp_path / 'ran')!r}, 'w')\nclass X: pass\n")
    with pytest.raises(ValueError, match=words) as error:
        load_tokenizer(OPTIONS._replace(name=str(tmp_path)))
    assert f"tokenizer.name is {str(tmp_path)!r}" in str(error.value) and len(str(error.value).splitlines()) == 1
    assert not (tmp_path / "ran").exists()


@pytest.mark.parametrize("name, damage", [
    ("tokenizer.json", "{"), ("tokenizer.json", "{}"), ("tokenizer_config.json", "[]"), ("tokenizer_config.json", "{}"), ("tokenizer_config.json", '{"eos_token": 3}')
])  # fmt: skip
def test_a_damaged_tokenizer_of_a_run_is_one_sentence(bpe, name, damage, tmp_path):
    bpe.save(tmp_path)
    (tmp_path / name).write_text(damage)
    with pytest.raises(ValueError, match=name) as error:
        load_tokenizer(OPTIONS, tmp_path)
    assert len(str(error.value).splitlines()) == 1


def test_captions_without_an_end(bpe, tmp_path):
    """As ALBEF and TCL feed BERT: the same ids, less the last."""
    bare = train_tokenizer(CAPTIONS, OPTIONS._replace(end=False))
    with_end, without = bpe.encode_batch(["two boats", "x" * 99]), bare.encode_batch(["two boats", "x" * 99])
    length = int((with_end[0] == bpe.eos).argmax())
    np.testing.assert_array_equal(without[0, :length], with_end[0, :length])
    assert not (without == bpe.eos).any() and not without[0, length:].any() and without[1].all()
    bare.save(tmp_path)
    np.testing.assert_array_equal(load_tokenizer(OPTIONS._replace(end=False), tmp_path).encode_batch(["two boats"]), without[:1])


def test_a_tokenizer_without_an_end_is_refused(tmp_path):
    from tokenizers import Tokenizer, models
    from transformers import PreTrainedTokenizerFast

    PreTrainedTokenizerFast(tokenizer_object=Tokenizer(models.WordLevel({"a": 0}, unk_token="a"))).save_pretrained(tmp_path)
    with pytest.raises(ValueError, match="no EOS"):
        load_tokenizer(OPTIONS._replace(name=str(tmp_path)))


def test_senseless_options_are_named(tmp_path):
    for change, name in (({"vocab_size": 100}, "vocab_size"), ({"context_length": 0}, "context_length"), ({"captions": 0}, "captions")):
        with pytest.raises(ValueError, match=f"tokenizer.{name}"):
            train_tokenizer(CAPTIONS, OPTIONS._replace(**change))
    with pytest.raises(ValueError, match="context_length is 2"):
        train_tokenizer(CAPTIONS, OPTIONS._replace(context_length=2))
    with pytest.raises(ValueError, match="no captions"):
        train_tokenizer([], OPTIONS)
    with pytest.raises(ValueError, match="'bpe'"):
        load_tokenizer(OPTIONS)
    with pytest.raises(OSError):
        load_tokenizer(OPTIONS, tmp_path / "nothing")


def test_prompts():
    assert prompts("photo", ["dog", "{}"]) == [["a photo of a dog"], ["a photo of a {}"]]
    assert prompts(["a {}", "{} b"], ["x"]) == [["a x", "x b"]]
    assert all(template.count("{}") == 1 for templates in text.PROMPTS.values() for template in templates)
    with pytest.raises(ValueError, match="plain, photo"):
        prompts("foto", ["x"])
    with pytest.raises(ValueError, match="one {}"):
        prompts(["no place"], ["x"])
