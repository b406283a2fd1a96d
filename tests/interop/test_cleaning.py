"""An exported tokenizer reads raw strings as the run reads cleaned ones, of every style, id and template; else nothing is exported."""

import json
import random

import numpy as np
import pytest
from tokenizers import Tokenizer, models, normalizers, pre_tokenizers

from jaxvl.data.text import INVISIBLE, Cleaning, TokenizerOptions, load_tokenizer, train_tokenizer
from jaxvl.interop import cleaning, vocabulary
from jaxvl.interop.cleaning import cleaned
from jaxvl.interop.vocabulary import Given, write_tokenizer

PIECES = [c for c in map(chr, range(0x110000)) if c.isspace()] + [chr(c) for c in INVISIBLE] + list("abcABC -/.,'!?\"()*#:;~Σσİ<>pn") + [
    "<person>", "<PERSON>", "e\u0301", "\u00e9", "\ufb01", "\u212b", "ß", "ẞ", "\U0001f600", "ΑΣ", "Σ'Σ", "\u0345", "  ", "--"]  # fmt: skip


@pytest.mark.parametrize("how", [Cleaning(), Cleaning("albef", 1), Cleaning("albef", 5), Cleaning("albef")])
@pytest.mark.parametrize(
    "seeds", [pytest.param(range(300), id="share"), pytest.param(range(300, 40_000), id="rest", marks=pytest.mark.long)]
)
def test_normalizers_do_what_cleaning_does(how, seeds):
    steps = {"type": "Sequence", "normalizers": cleaning.steps(how)}
    backend = Tokenizer.from_str(json.dumps({**json.loads(Tokenizer(models.BPE()).to_str()), "normalizer": steps}))
    for seed in seeds:
        rng = random.Random(seed)
        raw = "".join(rng.choice(PIECES) for _ in range(rng.randrange(60)))
        assert backend.normalizer.normalize_str(raw) == cleaned([raw], how)[0], (seed, raw)


def own(tmp_path, pad):
    """A folder with a BERT-like tokenizer whose padding is where `pad` says: at 0, at the end, or nowhere."""
    names = ["[CLS]", "[SEP]", "[UNK]", "a", "red", "square", "<pad>", *".,!'-/"]
    names = ["[PAD]", *names] if pad == 0 else [*names, "[PAD]"] if pad == "end" else names
    backend = Tokenizer(models.WordLevel({name: i for i, name in enumerate(names)}, unk_token="[UNK]"))
    backend.normalizer, backend.pre_tokenizer = normalizers.Lowercase(), pre_tokenizers.Whitespace()
    backend.add_special_tokens(["[CLS]", "[SEP]", "[UNK]", *["[PAD]"] * (pad is not None)])
    tmp_path.mkdir(exist_ok=True)
    backend.save(str(tmp_path / "tokenizer.json"))
    config = {"tokenizer_class": "PreTrainedTokenizerFast", "cls_token": "[CLS]", "sep_token": "[SEP]", "unk_token": "[UNK]"}
    (tmp_path / "tokenizer_config.json").write_text(json.dumps(config | ({"pad_token": "[PAD]"} if pad is not None else {})))
    return TokenizerOptions(name=str(tmp_path), context_length=9)


@pytest.mark.parametrize("moved", [False, True])
@pytest.mark.parametrize("pad", [0, "end", None])
def test_ids_of_raw_strings_are_the_runs(pad, moved, tmp_path):
    tokenizer = load_tokenizer(own(tmp_path / "own", pad))
    assert tokenizer.offset == (pad != 0)
    ids = np.roll(np.arange(tokenizer.vocab_size), 1) if moved and pad == 0 else None
    ids = ids if ids is None else np.concatenate([[0], np.roll(np.arange(1, tokenizer.vocab_size), 1)])
    write_tokenizer(tokenizer, tmp_path / "out", ids, Given(Cleaning("albef"), ("input_ids",), whole=True))
    from transformers import AutoTokenizer

    theirs = AutoTokenizer.from_pretrained(tmp_path / "out")
    raw = ["A  red\tsquare!", "a-red/square", "", " \u200b", "square " * 30]
    want = tokenizer.encode_batch(cleaned(raw, Cleaning("albef")))
    found = theirs(raw, padding="max_length", truncation=True, return_tensors="np")
    assert list(found) == ["input_ids"]
    np.testing.assert_array_equal(found["input_ids"], want if ids is None else ids[want])


def test_a_prompt_stays_as_it_is(tmp_path):
    options = TokenizerOptions(context_length=24, vocab_size=512, prompt='the "{}", lies', prompt_shared=False)
    tokenizer = train_tokenizer(["a dog", "two letters"], options)
    write_tokenizer(tokenizer, tmp_path, None, Given(Cleaning("albef")))
    found = Tokenizer.from_file(str(tmp_path / "tokenizer.json")).encode('the "a dog", lies').ids
    assert found == [i for i in tokenizer.encode_batch(["a dog"])[0].tolist() if i]


def test_a_tokenizer_that_reads_otherwise_is_not_exported(tmp_path, monkeypatch):
    monkeypatch.setattr(cleaning, "BLANK", " ")
    with pytest.raises(ValueError, match=r"the exported tokenizer reads .* the run as .*cannot be exported"):
        write_tokenizer(train_tokenizer(["a red square"], TokenizerOptions(vocab_size=512)), tmp_path, None, Given(Cleaning()))


def test_probes_differ_where_a_step_is_missing():
    """Each normalizer is held by a string that is compared at every export."""
    for how in (Cleaning(), Cleaning("albef")):
        steps = cleaning.steps(how)
        for i, step in enumerate(steps):
            rest = {"type": "Sequence", "normalizers": steps[:i] + steps[i + 1 :]}
            backend = Tokenizer.from_str(json.dumps({**json.loads(Tokenizer(models.BPE()).to_str()), "normalizer": rest}))
            assert any(backend.normalizer.normalize_str(probe) != cleaned([probe], how)[0] for probe in vocabulary.PROBES), step
