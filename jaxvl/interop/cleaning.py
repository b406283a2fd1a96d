"""What `data.text.clean_caption` does, said in the vocabulary of the tokenizers library, so that an exported tokenizer takes raw strings."""

from collections.abc import Sequence
from typing import Any

from jaxvl.data.text import INVISIBLE, Cleaning, Uncaptioned, clean_caption

BLANK = "".join(c for c in map(chr, range(0x110000)) if c.isspace() or ord(c) in INVISIBLE)  # what becomes a space, literally
# Lower case of a sigma at the end of a word (Unicode, section 3.13), which the library's own lower case does not know.
FINAL_SIGMA = r"[\p{Cased}&&\P{Case_Ignorable}]\p{Case_Ignorable}*\KΣ(?!(?>\p{Case_Ignorable}*)\p{Cased})"


def steps(cleaning: Cleaning) -> list[dict[str, Any]]:
    """Normalizers that make of a raw caption what `clean_caption` makes of it, but for its bound of 16 KiB."""
    blanks, ends = _replace(f"[{BLANK}]+", " "), _replace(r"\A | \z", "")
    if cleaning.style == "albef":
        return [
            blanks,
            _replace(FINAL_SIGMA, "ς"),
            {"type": "Lowercase"},
            _replace(r"""[,.'!?"()*#:;~]""", ""),
            _replace("[-/]", " "),
            _replace("<person>", "person"),
            _replace(" {2,}", " "),
            ends,
            _replace(rf"\A(?:[^ ]+ ){{{cleaning.words - 1}}}[^ ]+\K [\s\S]*", ""),
        ]
    return [blanks, ends]


def _replace(pattern: str, content: str) -> dict[str, Any]:
    return {"type": "Replace", "pattern": {"Regex": pattern}, "content": content}


def cleaned(captions: Sequence[str], cleaning: Cleaning) -> list[str]:
    """Captions as the run reads them; one in which nothing is visible is empty."""

    def one(caption: str) -> str:
        try:
            return clean_caption(caption, cleaning)
        except Uncaptioned:
            return ""

    return [one(caption) for caption in captions]
