"""A tokenizer of whole words: lower-case, ASCII punctuation removed, split at blanks, a vocabulary in sorted order.

The text side of TIRG, VAL and JVSM, whose recurrent encoders read words. A word that training never saw is unknown.
"""

import string
from collections.abc import Iterable
from typing import Any

UNKNOWN = "<unk>"


def words(text: str) -> list[str]:
    """The words of a text."""
    return text.translate(str.maketrans("", "", string.punctuation)).lower().split()


def vocabulary(texts: Iterable[str], most: int = 0) -> list[str]:
    """All words in sorted order; where there are more than `most` (0: no bound), the most frequent ones."""
    counts: dict[str, int] = {}
    for text in texts:
        for word in words(text):
            counts[word] = counts.get(word, 0) + 1
    kept = sorted(counts, key=lambda w: (-counts[w], w))[:most] if most else counts
    return sorted(kept)


def backend(texts: Iterable[str], specials: list[str], most: int = 0) -> Any:
    """A tokenizers.Tokenizer with `specials`, the unknown word and then the vocabulary as its ids, at most `most` in all."""
    from tokenizers import Regex, Tokenizer, models, normalizers, pre_tokenizers

    front = [*specials, UNKNOWN]
    ids = {word: i for i, word in enumerate(front + vocabulary(texts, max(most - len(front), 0)))}
    made = Tokenizer(models.WordLevel(ids, unk_token=UNKNOWN))
    punctuation = normalizers.Replace(Regex("[" + "".join("\\" + c for c in string.punctuation) + "]"), "")
    made.normalizer = normalizers.Sequence([punctuation, normalizers.Lowercase()])
    made.pre_tokenizer = pre_tokenizers.WhitespaceSplit()
    made.add_special_tokens(specials)
    return made
