"""The special tokens of a published tokenizer, where its own template puts them, and what is wrong with one that cannot be opened."""

import itertools
from pathlib import Path
from typing import Any, NamedTuple


class Special(NamedTuple):
    """Tokens of a tokenizer that are no text. front, back: those that its template puts around each text, in their order."""

    front: tuple[str, ...]
    back: tuple[str, ...]
    bos: str | None
    eos: str
    pad: str | None
    mask: str | None = None


def around(backend: Any) -> tuple[tuple[str, ...], tuple[str, ...]]:
    """The tokens that a tokenizers.Tokenizer puts in front of a text and behind it, by its own post-processor.

    Raises ValueError where it does other things with a text.
    """
    backend.no_truncation()
    backend.no_padding()
    for probe in ("a", "the", "0", *itertools.islice(backend.get_vocab(), 1000)):
        alone, whole = backend.encode(probe, add_special_tokens=False).ids, backend.encode(probe).ids
        if alone:
            break
    for i in range(len(whole) - len(alone) + 1):
        if alone and whole[i : i + len(alone)] == alone:
            front, back = whole[:i], whole[i + len(alone) :]
            return tuple(map(backend.id_to_token, front)), tuple(map(backend.id_to_token, back))
    raise ValueError(f"the tokenizer's post-processor makes {whole} of the ids {alone}; only tokens in front and behind can be put")


def backend_of(file: Path) -> Any:
    """The tokenizers.Tokenizer of a tokenizer.json. Raises ValueError where it holds none."""
    from tokenizers import Tokenizer as Backend

    try:
        return Backend.from_file(str(file))
    except Exception as error:  # the library raises this very class for everything it meets
        raise ValueError(f"{file} is no tokenizer that can be read ({error}); was the file cut or changed?") from None


def why(name: str, error: Exception) -> str:
    """One sentence on what is wrong with a tokenizer that transformers does not open."""
    from jaxvl.interop.foreign import told

    if "trust_remote_code" in str(error):
        return "it is made by code of its own, which is never run; use one that has a tokenizer.json"
    files = (Path(name) / file for file in ("tokenizer.json", "tokenizer_config.json"))
    return next(filter(None, map(told, filter(Path.is_file, files))), "") or next(filter(None, str(error).splitlines()), repr(error))
