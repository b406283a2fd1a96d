"""Words of a tokenizer, kept and checked; captions in a prompt as one string; what prompts share, and what joins with it."""

import json

import numpy as np
import pytest

from jaxvl.data import lexicon
from jaxvl.data.special import Special
from jaxvl.data.text import EOS, PAD, Tokenizer, TokenizerOptions, load_tokenizer, train_tokenizer

CAPTIONS = ["A small red boat on the lake.", "two boats, one lake", "<person> said", '"so" <person>'] * 20
ASK = 'The focus of "{}" lies on:'
OPTIONS = TokenizerOptions(vocab_size=600, context_length=40, end=False, prompt=ASK, lexicon="ascii_lower_len2")


@pytest.fixture(scope="module")
def bpe():
    return train_tokenizer(CAPTIONS, OPTIONS)


@pytest.fixture(scope="module")
def joining():
    """A BPE that joins a quotation mark with a following "<" and a preceding full stop, as the tokenizer of Llama 2 does."""
    from tokenizers import Tokenizer as Backend, models

    letters = sorted(set(ASK + "A boat.<person>'x"))
    pieces = [PAD, EOS, *letters, '"<', '."', "of"]
    backend = Backend(models.BPE({piece: i for i, piece in enumerate(pieces)}, [('"', "<"), (".", '"'), ("o", "f")]))
    return lambda length=60: Tokenizer(backend, length, Special((), (), None, EOS, PAD))


def test_a_prompt_is_one_string(joining):
    """Against tokenising the whole text, which no putting together of parts gives."""
    made = joining()
    apart = [made.encode_batch([part]) for part in ('The focus of "', "<person>.", '" lies on:')]
    apart = np.concatenate([row[row > 0] for row in apart])
    whole = made.encode_batch([ASK.replace("{}", "<person>.")])[0]
    made.ask(ASK)
    got = made.encode_batch(["<person>."])[0]
    np.testing.assert_array_equal(got, whole)
    assert len(got[got > 0]) == len(apart) - 2
    assert made.decode(got).replace(" ", "") == 'Thefocusof"<person>."lieson:'


def test_what_prompts_share_ends_before_the_join(joining):
    made = joining()
    head = made.encode_batch(['The focus of "'])[0]
    made.ask(ASK)
    assert made.prompt.shared == tuple(head[head > 0][:-1])
    assert made.prompt.head == len(head[head > 0])
    rows = made.encode_batch(["<person>", "A boat.", "", '"'])
    assert (rows[:, : len(made.prompt.shared)] == made.prompt.shared).all()
    tail = made.encode_batch(["A boat"])[0]
    assert made.prompt.tail <= len(" lies on:")
    assert made._backend.decode([int(i) for i in tail[tail > 0][-made.prompt.tail :]]).replace(" ", "") == "lieson:"


def test_a_caption_that_changes_the_shared_ids_is_refused(joining):
    made = joining()
    made.ask(ASK)
    made.prompt = made.prompt._replace(shared=(*made.prompt.shared, made._backend.token_to_id('"')))
    made.encode_batch(["A boat"])
    with pytest.raises(ValueError, match=r"the caption '<person>' changes the first \d+ ids.*prompt_shared=False"):
        made.encode_batch(["A boat", "<person>"])
    loose = joining()
    loose.ask(ASK, shared=False)
    assert loose.prompt.shared == ()
    np.testing.assert_array_equal(loose.encode_batch(["<person>"])[0][:3], made.encode_batch(["A"])[0][:3])


def test_long_captions_are_cut_and_prompts_never(bpe):
    rows = bpe.encode_batch(["two boats one lake " * 9, "two boats"])
    tail = rows[1][rows[1] > 0][-bpe.prompt.tail :]
    for row in rows:
        np.testing.assert_array_equal(row[row > 0][-bpe.prompt.tail :], tail)
        assert tuple(row[: len(bpe.prompt.shared)]) == bpe.prompt.shared
    bpe.ask(ASK, 2)
    short = bpe.encode_batch(["two boats one lake"])[0]
    empty = bpe.encode_batch([""])[0]
    assert 0 < np.sum(short > 0) - np.sum(empty > 0) <= 2
    bpe.ask(ASK)
    with pytest.raises(ValueError, match="the prompt alone takes"):
        train_tokenizer(CAPTIONS, OPTIONS._replace(context_length=6))


def test_words_by_rule(bpe):
    pieces = set(bpe.lexicon.pieces)
    assert "Ġlake" in pieces
    assert not {"Ġ", "e", ".", PAD, EOS} & pieces
    assert all(lexicon.bare(p).isascii() and lexicon.bare(p).islower() and len(lexicon.bare(p)) > 1 for p in pieces)
    assert [bpe._backend.id_to_token(int(i)) for i in bpe.lexicon.ids] == list(bpe.lexicon.pieces)
    every = train_tokenizer(CAPTIONS, OPTIONS._replace(lexicon="all"))
    assert len(every.lexicon.ids) == every.vocab_size - 4  # but for the special tokens
    seen = train_tokenizer(CAPTIONS, OPTIONS._replace(name="words", lexicon_min_count=30))
    assert seen.lexicon.pieces == ("lake", "person")
    stop = int(seen.lexicon.ids[0])
    less = train_tokenizer(CAPTIONS, OPTIONS._replace(name="words", lexicon_min_count=30, lexicon_stop=(stop,)))
    assert less.lexicon.pieces == ("person",)
    with pytest.raises(ValueError, match="keeps none of"):
        train_tokenizer(CAPTIONS, OPTIONS._replace(lexicon_min_count=10**6))


def test_words_from_a_file(tmp_path):
    file = tmp_path / "ids.json"
    file.write_text("[300, 299]")
    assert train_tokenizer(CAPTIONS, OPTIONS._replace(lexicon=str(file))).lexicon.ids.tolist() == [299, 300]
    file.write_text("299\n99999\n")
    with pytest.raises(ValueError, match="lists 99999, which is no word"):
        train_tokenizer(CAPTIONS, OPTIONS._replace(lexicon=str(file)))
    file.write_text("boat")
    with pytest.raises(ValueError, match="must hold ids"):
        train_tokenizer(CAPTIONS, OPTIONS._replace(lexicon=str(file)))


def test_the_list_is_kept_and_a_mismatch_is_told(bpe, tmp_path):
    bpe.save(tmp_path)
    again = load_tokenizer(OPTIONS, tmp_path)
    np.testing.assert_array_equal(again.lexicon.ids, bpe.lexicon.ids)
    assert (again.lexicon.sha256, again.prompt) == (bpe.lexicon.sha256, bpe.prompt)
    for change, message in (
        (dict(lexicon="all"), "config.tokenizer.lexicon is 'all', but this run's codebooks are of the"),
        (dict(lexicon_min_count=3), "lexicon_min_count is 3"),
    ):
        with pytest.raises(ValueError, match=message):
            load_tokenizer(OPTIONS._replace(**change), tmp_path)
    file = tmp_path / lexicon.FILE
    body = json.loads(file.read_text())
    body["ids"][:2] = body["ids"][1::-1]
    file.write_text(json.dumps(body))
    with pytest.raises(ValueError, match="they are not of one run"):
        load_tokenizer(OPTIONS, tmp_path)
    body["pieces"][:2] = body["pieces"][1::-1]
    file.write_text(json.dumps(body))
    with pytest.raises(ValueError, match="has been changed: its words hash to"):
        load_tokenizer(OPTIONS, tmp_path)
    file.unlink()
    with pytest.raises(ValueError, match="cannot be read"):
        load_tokenizer(OPTIONS, tmp_path)


def test_a_checkpoint_of_other_words_is_refused(bpe, tmp_path):
    meta = lexicon.stamp(bpe)
    lexicon.same(bpe, meta, tmp_path)
    lexicon.same(None, {}, tmp_path)
    for tokenizer, other in ((bpe, {}), (bpe, {"words": "0" * 64}), (None, meta)):
        with pytest.raises(ValueError, match="has codebooks of .* but the tokenizer of this run keeps"):
            lexicon.same(tokenizer, other, tmp_path)


@pytest.mark.parametrize(("change", "message"), [
    (dict(lexicon="ascii"), "tokenizer.lexicon is 'ascii'; it takes ascii_lower_len2"), (dict(prompt="focus of"), "a text with one {}"),
    (dict(lexicon_min_count=-1), "must be at least 0"), (dict(caption_length=-1), "caption_length is -1"),
])  # fmt: skip
def test_refused(change, message):
    with pytest.raises(ValueError, match=message):
        train_tokenizer(CAPTIONS, OPTIONS._replace(**change))
