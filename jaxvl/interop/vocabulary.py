"""A tokenizer written so that a client gets from a raw string the ids that an exported model expects."""

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np

from jaxvl.data.text import Cleaning
from jaxvl.interop import cleaning as cleanings

# Strings that differ in what cleaning, normalisation and truncation make of them; a tokenizer that agrees on these is the same.
PROBES = (
    "a red square", "A Red  SQUARE", "\ta\nred\r\n square ", "\u00a0a\u2003red\u200bsquare\ufeff", "caf\u00e9, cafe\u0301", "\ufb01ne \u2460 \uff21",
    "it's a half-open/shut door: 'so', \"no\"!", "\u039f\u0394\u039f\u03a3 STRASSE \u1e9e \u0130", "\u65e5\u672c\u8a9e \u0440\u0443\u0441\u0441\u043a\u0438\u0439 \U0001f600", "<person> #1 (a*b) ~ x;y", "word " * 200,
)  # fmt: skip


class Given(NamedTuple):
    """What a client's tokenizer is to do. cleaning: of captions, as in training. inputs: what the model takes of its output.
    whole: whether the model takes captions padded to the context length, as one that attends to padding was trained."""

    cleaning: Cleaning
    inputs: tuple[str, ...] = ("input_ids", "attention_mask")
    whole: bool = False


def write_tokenizer(tokenizer: Any, folder: Path, ids: np.ndarray | None, given: Given) -> None:
    """tokenizer.json and tokenizer_config.json of a `data.text.Tokenizer`, which take raw captions to the ids of the exported model, or
    cleaned ones in their prompt where there is one.

    ids: the exported id of each of our ids, None where they stay. Where ours are one above the tokenizer's own (its offset), the
    files get ours, with a padding token at 0. Raises ValueError where the files give other ids than training has read.
    """
    tokenizer.save(folder)
    file, names = folder / "tokenizer.json", folder / "tokenizer_config.json"
    content, config = json.loads(file.read_text()), json.loads(names.read_text())
    if ids is not None or tokenizer.offset:
        _renumber(content, config, tokenizer.offset, ids)
    if not tokenizer.prompt:  # what stands in a prompt has been cleaned alone, which the tokenizer of the whole cannot do
        last = [content["normalizer"]] if content.get("normalizer") else []
        content["normalizer"] = {"type": "Sequence", "normalizers": [*cleanings.steps(given.cleaning), *last]}
    # AutoProcessor takes padding and truncation from here; AutoTokenizer is told them by its caller.
    config |= {"model_input_names": list(given.inputs), "padding_side": "right", "padding": "max_length" if given.whole else True, "truncation": True,
               "max_length": tokenizer.context_length, "clean_up_tokenization_spaces": False}  # fmt: skip
    file.write_text(json.dumps(content, ensure_ascii=False))
    names.write_text(json.dumps(config, indent=2) + "\n")
    if not tokenizer.prompt:
        _check(tokenizer, folder, ids, given.cleaning)


def _renumber(content: dict[str, Any], config: dict[str, Any], offset: int, ids: np.ndarray | None) -> None:
    move = lambda own: own + offset if ids is None else int(ids[own + offset])
    model = content["model"]
    taken = model["vocab"] if isinstance(model["vocab"], dict) else {piece for piece, _ in model["vocab"]}
    pad = next(name for name in ("<pad>", "<padding>", "<0>") if name not in taken) if offset else None
    if isinstance(model["vocab"], dict):
        model["vocab"] = dict(sorted(((token, move(i)) for token, i in model["vocab"].items()), key=lambda item: item[1])) | (
            {pad: 0} if pad else {}
        )
    else:  # Unigram: the place in the list is the id
        rows = {move(i): row for i, row in enumerate(model["vocab"])} | ({0: [pad, 0.0]} if pad else {})
        model["vocab"] = [rows.get(i, [f"<unused{i}>", -1e9]) for i in range(max(rows) + 1)]
        if model.get("unk_id") is not None:
            model["unk_id"] = move(model["unk_id"])
    content["added_tokens"] = [{**token, "id": move(token["id"])} for token in content.get("added_tokens") or []]
    if pad:
        flags = {"single_word": False, "lstrip": False, "rstrip": False, "normalized": False, "special": True}
        content["added_tokens"].insert(0, {"id": 0, "content": pad, **flags})
        config["pad_token"] = pad
    if content.get("post_processor"):
        _renumber_template(content["post_processor"], move)


def _renumber_template(processor: dict[str, Any], move: Callable[[int], int]) -> None:
    """The ids in a post-processor: of a template, of BERT's or RoBERTa's, or of a sequence of them."""
    for special in processor.get("special_tokens", {}).values():
        special["ids"] = [move(i) for i in special["ids"]]
    for name in ("sep", "cls"):
        if name in processor:
            token, own = processor[name]
            processor[name] = [token, move(own)]
    for inner in processor.get("processors", ()):
        _renumber_template(inner, move)


def _check(tokenizer: Any, folder: Path, ids: np.ndarray | None, cleaning: Cleaning) -> None:
    from tokenizers import Tokenizer as Backend

    exported = Backend.from_file(str(folder / "tokenizer.json"))
    rows = tokenizer.encode_batch(cleanings.cleaned(PROBES, cleaning))
    for probe, row in zip(PROBES, rows, strict=True):
        want = (row[row != 0] if ids is None else ids[row[row != 0]]).tolist()
        if (found := exported.encode(probe).ids) != want:
            raise ValueError(
                f"the exported tokenizer reads {probe[:60]!r} as {found[:8]}..., the run as {want[:8]}...: it cannot be exported"
            )
