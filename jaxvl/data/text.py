"""Captions to token ids: a tokenizer from a folder or the Hugging Face hub, or a BPE trained on the captions themselves.

Token 0 is padding and nothing else, whatever the tokenizer: the ids of one whose pad token is missing, shared with another
token or not 0 are moved up by one (`Tokenizer.offset`), so `tokens != 0` is the mask of every text encoder.
"""

import itertools
import json
import re
from collections import Counter
from collections.abc import Iterable, Sequence
from pathlib import Path
from typing import Any, Literal, NamedTuple

import numpy as np

from jaxvl.data import lexicon as lexicons, words
from jaxvl.data.lexicon import Lexicon, Prompt
from jaxvl.data.lists import read_json
from jaxvl.data.special import Special, around, backend_of, why

PAD, BOS, EOS, MASK = "<pad>", "<bos>", "<eos>", "<mask>"  # of the trained tokenizers
NAMED = ("bos", "eos", "pad", "mask")  # special tokens that have a name
TRAINED = ("bpe", "words")  # tokenizers that are made of the captions themselves
LONGEST = 1 << 14  # bytes of a caption that are looked at; no encoder reads more
PUNCTUATION = re.compile(r"""[,.'!?"()*#:;~]""")  # what ALBEF's cleaning deletes
INVISIBLE = dict.fromkeys(map(ord, "\0\ufeff\u200b\u2060"), " ")  # NUL, byte order mark and spaces of no width

# Prompts of zero-shot classification; a class is the mean of its prompts' embeddings (Radford et al., 2021, section 3.1.4).
PROMPTS = {
    "plain": ("{}",),
    "photo": ("a photo of a {}",),
    "views": (
        "a photo of a {}",
        "a close view of a {}",
        "a {} seen from far away",
        "a dark picture of a {}",
        "a bright picture of a {}",
        "a drawing of a {}",
        "a {} on a plain background",
        "several of a kind: {}",
    ),
    "letters": ("{}", "the character {}", "{} in print", "{} in an unknown typeface"),
}


class Uncaptioned(ValueError):
    """A caption that must not be used. `reason`: blank or undecodable."""

    def __init__(self, reason: str, detail: str = "") -> None:
        super().__init__(f"{reason}: {detail}" if detail else reason)
        self.reason = reason


class Cleaning(NamedTuple):
    """What becomes of the captions of a source. plain: `clean_caption` alone; albef: `albef_caption` after it, `words` at most."""

    style: Literal["plain", "albef"] = "plain"
    words: int = 30


class TokenizerOptions(NamedTuple):
    """name: "bpe", "words" (words.py), or a folder or hub name of a fast tokenizer. context_length: ids a caption, BOS and EOS included.

    end: False leaves out the EOS in which the tokenizer's own template ends a caption; ALBEF and TCL feed BERT none ([CLS] and word pieces). vocab_size and captions (how many to train
    on at most) are those of a tokenizer made of captions, lowercase that of the BPE.

    prompt: a text with one {} for the caption, or a name in `lexicon.PROMPTS`; it is tokenised with the caption as one string, and never cut.
    caption_length: ids that a caption may add to it, 0 for as many as fit. prompt_shared: refuse a caption that changes the ids which all prompts
    begin with, so that a decoder may read those once for all captions. lexicon: the ids that are words of lexical vectors, by rule
    (`lexicon.RULES`) or from a file; lexicon_min_count: those of them seen as often in the captions; lexicon_stop: ids of the tokenizer that are none.
    """

    name: str = "bpe"
    context_length: int = 77
    vocab_size: int = 16384
    lowercase: bool = True
    captions: int = 1_000_000
    end: bool = True
    prompt: str = ""
    caption_length: int = 0
    prompt_shared: bool = True
    lexicon: str = ""
    lexicon_min_count: int = 0
    lexicon_stop: tuple[int, ...] = ()


class Tokenizer:
    """Captions to ids and back.

    vocab_size: number of ids, padding included. bos, eos, mask: their ids, None for a bos or mask that the tokenizer has not. ends: whether
    captions end in EOS, which the tokenizer's own template decides, as it does whether they begin with BOS. offset: what was
    added to the ids of the tokenizer it came from, 0 or 1; imported embedding tables need as many rows put in front. prompt, lexicon: see
    `ask` and `lexicon.py`, None without.
    """

    def __init__(self, backend: Any, context_length: int, special: Special, end: bool = True) -> None:
        """`backend` is a tokenizers.Tokenizer; it is kept and changed: template, truncation, no padding. end: captions keep EOS."""
        from tokenizers import processors

        front, back = special.front, special.back if end else tuple(t for t in special.back if t != special.eos)
        if context_length <= len(front) + len(back):
            raise ValueError(
                f"tokenizer.context_length is {context_length}; it takes {1 + len(front) + len(back)} or more, for "
                f"{''.join([*front, *back])} and a token"
            )
        ids = {token: backend.token_to_id(token) for token in (*front, *back, special.bos, special.eos, special.pad, special.mask) if token}
        if lost := [token for token in (*front, *back, special.eos) if ids[token] is None]:
            raise ValueError(f"the tokenizer has no id for its own token {lost[0]}")
        template = [*(f"{token}:0" for token in front), "$A", *(f"{token}:0" for token in back)]
        backend.post_processor = processors.TemplateProcessing(
            template, None, [(token, ids[token]) for token in dict.fromkeys((*front, *back))]
        )
        backend.enable_truncation(context_length)
        backend.no_padding()
        self._backend, self._special = backend, special
        self.offset = 0 if special.pad and special.pad not in (special.bos, special.eos) and ids[special.pad] == 0 else 1
        self.context_length = context_length
        self.vocab_size = backend.get_vocab_size() + self.offset
        own = lambda token: None if ids.get(token) is None else ids[token] + self.offset
        self.bos, self.eos, self.mask = own(special.bos), ids[special.eos] + self.offset, own(special.mask)
        self.ends = special.eos in back
        self.prompt: Prompt | None = None
        self.lexicon: Lexicon | None = None
        self._most, self._behind = context_length, len(back)

    def ask(self, template: str, caption_length: int = 0, *, shared: bool = True) -> None:
        """From now on captions are put into `template`, which has one {}. Raises ValueError where the context leaves no room for a caption.

        shared: refuse captions that change the ids in which all prompts begin.
        """
        self._backend.no_truncation()
        probes = [self._ids([template.replace("{}", probe)])[0] for probe in lexicons.PROBES]
        empty = len(probes[0])
        room = self.context_length - empty
        if room < 1 or caption_length > room:
            raise ValueError(
                f"tokenizer.context_length is {self.context_length}; the prompt alone takes {empty} ids, and tokenizer.caption_length asks for {caption_length or 1} more"
            )
        front, tail = lexicons.shared_ends(probes)
        # Where no probe joins with the last id in front of the caption, another caption still may.
        head = template.split("{}")[0]
        whole = len(self._ids([head])[0]) - self._behind if head else 0
        front = front[: max(whole - 1, 0)]
        self.prompt = Prompt(template, tuple(i + self.offset for i in front) if shared else (), tail, whole)
        self._most = empty + (caption_length or room)

    def encode_batch(self, captions: Sequence[str]) -> np.ndarray:
        """int32 [len(captions), context_length]: BOS, tokens, EOS (where captions end in one), padding; a long caption loses its end, never its EOS.

        With a prompt, BOS, the prompt around the caption, EOS. Raises ValueError for a caption that changes how a prompt begins, where that is guarded.
        """
        rows = self._ids(captions) if self.prompt is None else self._prompted(captions, self.prompt)
        lengths = np.fromiter(map(len, rows), np.int64, len(rows))
        tokens = np.zeros((len(rows), self.context_length), np.int32)
        flat = np.fromiter(itertools.chain.from_iterable(rows), np.int32, int(lengths.sum()))
        tokens[np.arange(self.context_length) < lengths[:, None]] = flat + self.offset
        return tokens

    def _ids(self, texts: Sequence[str]) -> list[list[int]]:
        return [encoding.ids for encoding in self._backend.encode_batch_fast(texts)]

    def _prompted(self, captions: Sequence[str], prompt: Prompt) -> list[list[int]]:
        captions = list(captions)
        rows = self._ids([prompt.template.replace("{}", caption) for caption in captions])
        while long := [i for i, row in enumerate(rows) if len(row) > self._most]:
            for i, alone in zip(long, self._backend.encode_batch([captions[i] for i in long], add_special_tokens=False), strict=True):
                # What a caption adds to a prompt is about, and not always, what it comes to alone: so until it fits.
                kept = max(len(alone.ids) - (len(rows[i]) - self._most), 0)
                cut = captions[i][: alone.offsets[kept - 1][1]] if kept else ""
                captions[i] = cut if len(cut) < len(captions[i]) else captions[i][:-1]
            for i, row in zip(long, self._ids([prompt.template.replace("{}", captions[i]) for i in long]), strict=True):
                rows[i] = row
        front = [i - self.offset for i in prompt.shared]
        if odd := [caption for caption, row in zip(captions, rows, strict=True) if row[: len(front)] != front]:
            raise ValueError(
                f"the caption {odd[0]!r} changes the first {len(front)} ids, which all prompts should share, since the tokenizer joins it with the "
                f"prompt; set tokenizer.prompt_shared=False, which reads each prompt whole"
            )
        return rows

    def decode(self, tokens: np.ndarray) -> str:
        """The text of one row of ids, without special tokens and padding."""
        return self._backend.decode([int(t) - self.offset for t in tokens if t], skip_special_tokens=True).strip()

    def save(self, folder: str | Path) -> None:
        """Write tokenizer.json and tokenizer_config.json, which load_tokenizer and transformers.AutoTokenizer read.

        The files hold the tokenizer's own ids, before `offset`.
        """
        folder = Path(folder)
        folder.mkdir(parents=True, exist_ok=True)
        config = {"tokenizer_class": "PreTrainedTokenizerFast", "model_max_length": self.context_length}
        config |= {f"{name}_token": token for name in NAMED if (token := getattr(self._special, name))}
        (folder / "tokenizer_config.json").write_text(json.dumps(config, indent=2) + "\n")
        self._backend.save(str(folder / "tokenizer.json"))
        if self.lexicon is not None:
            lexicons.save(self.lexicon, folder, self.offset)


def check(options: TokenizerOptions) -> None:
    """Raise ValueError for a value that cannot be meant."""
    if options.name == "bpe" and options.vocab_size < 512:
        raise ValueError(f"tokenizer.vocab_size is {options.vocab_size}; 256 are bytes and four are special, so it takes 512 or more")
    for name in ("context_length", "captions"):
        if getattr(options, name) < 1:
            raise ValueError(f"tokenizer.{name} is {getattr(options, name)}; it takes a positive number")
    if not options.name:
        raise ValueError("tokenizer.name is ''; it must be bpe, words, or a folder or hub name of a tokenizer")
    least = 1 + (options.name == "bpe") + options.end
    if options.name in TRAINED and options.context_length < least:
        raise ValueError(
            f"tokenizer.context_length is {options.context_length}; it must be at least {least}, for a token and what stands around it"
        )
    if options.caption_length < 0:
        raise ValueError(f"tokenizer.caption_length is {options.caption_length}; it must be positive, or 0 for as many as fit")
    lexicons.check(options.lexicon, options.prompt, options.lexicon_min_count)


def train_tokenizer(captions: Iterable[str], options: TokenizerOptions) -> Tokenizer:
    """A byte-level BPE of `captions`, the same for the same captions in any order; no caption has an unknown token. Or their words.

    Few captions give fewer tokens than vocab_size. Raises ValueError where there is no caption at all.
    """
    from tokenizers import Tokenizer as Backend, decoders, models, normalizers, pre_tokenizers, trainers

    check(options)
    captions = iter(captions)
    try:
        first = next(captions)
    except StopIteration:
        raise ValueError("there are no captions to train a tokenizer on; set tokenizer.name to a folder or a hub name") from None
    kept = list(itertools.islice(itertools.chain([first], captions), options.captions))
    captions = [*lexicons.template(options.prompt).split("{}"), *kept] if options.prompt else kept
    if options.name == "words":
        made = Tokenizer(
            words.backend(captions, [PAD, EOS], options.vocab_size),
            options.context_length,
            Special((), (EOS,), None, EOS, PAD),
            options.end,
        )
        return _complete(made, options, kept)
    backend = Backend(models.BPE())
    steps = [normalizers.NFKC()] + [normalizers.Lowercase()] * options.lowercase
    backend.normalizer = normalizers.Sequence(steps)
    backend.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=True)
    backend.decoder = decoders.ByteLevel()
    alphabet = pre_tokenizers.ByteLevel.alphabet()
    trainer = trainers.BpeTrainer(
        vocab_size=options.vocab_size, special_tokens=[PAD, BOS, EOS, MASK], initial_alphabet=alphabet, show_progress=False
    )
    backend.train_from_iterator(captions, trainer)
    return _complete(Tokenizer(backend, options.context_length, Special((BOS,), (EOS,), BOS, EOS, PAD, MASK), options.end), options, kept)


def load_tokenizer(options: TokenizerOptions, folder: str | Path | None = None, seen: Iterable[str] = ()) -> Tokenizer:
    """The tokenizer that `Tokenizer.save` left in `folder`, or else the one that `options.name` names.

    seen: captions whose ids are counted where options.lexicon_min_count asks for it; not those of a folder, which keeps its list of words.
    Raises OSError where it cannot be found, ValueError where it has no fast version, no token that ends a text or no such words.
    """
    check(options)
    if folder is not None:
        names = read_json(Path(folder) / "tokenizer_config.json")
        if not isinstance(names, dict) or not isinstance(names.get("eos_token"), str):
            raise ValueError(f"{folder}/tokenizer_config.json names no eos_token; it is damaged")
        backend = backend_of(Path(folder) / "tokenizer.json")
        bos, eos, pad, mask = (names.get(f"{name}_token") for name in NAMED)
        special = Special(*around(backend), bos, eos or "", pad, mask)
        return _complete(Tokenizer(backend, options.context_length, special, options.end), options, (), Path(folder))
    if options.name in TRAINED:
        raise ValueError(f"tokenizer.name is {options.name!r}, which is trained on captions; only a folder or a hub name can be loaded")
    from transformers import AutoTokenizer

    try:
        found = AutoTokenizer.from_pretrained(options.name, trust_remote_code=False)
    except Exception as error:  # the libraries raise bare Exceptions for damaged files, and what its code wants for a missing package
        raise ValueError(f"tokenizer.name is {options.name!r}, which cannot be opened: {why(options.name, error)}") from error
    backend = getattr(found, "backend_tokenizer", None)
    if backend is None:
        raise ValueError(f"tokenizer.name is {options.name!r}, a {type(found).__name__}; only fast tokenizers (tokenizer.json) can be used")
    bos, eos = found.bos_token or found.cls_token, found.eos_token or found.sep_token
    if eos is None:
        raise ValueError(f"tokenizer.name is {options.name!r}, which has no EOS or SEP token; text encoders need one to end a caption")
    special = Special(*around(backend), bos, eos, found.pad_token, found.mask_token)
    return _complete(Tokenizer(backend, options.context_length, special, options.end), options, seen)


def _complete(made: Tokenizer, options: TokenizerOptions, seen: Iterable[str], folder: Path | None = None) -> Tokenizer:
    """The prompt and the words that the options ask for; the words are those of `folder`, where it is given."""
    if options.lexicon:
        what = {"rule": options.lexicon, "min_count": options.lexicon_min_count, "stop": list(options.lexicon_stop)}
        backend = made._backend
        vocabulary = backend.get_vocab()

        def count() -> Counter[int]:
            counts: Counter[int] = Counter()
            for some in _in_parts(seen, 4096):
                for row in made._ids(some):
                    counts.update(i + made.offset for i in row)
            if not counts:
                raise ValueError(f"tokenizer.lexicon_min_count is {options.lexicon_min_count}, and there are no captions to count words in")
            return counts

        if folder is not None:
            made.lexicon = lexicons.load(folder, vocabulary, made.offset, what)
        else:
            special = {str(t) for t in backend.get_added_tokens_decoder().values() if t.special} | {words.UNKNOWN}
            made.lexicon = lexicons.choose(
                vocabulary, special | set(filter(None, (getattr(made._special, name) for name in NAMED))), made.offset, what, count
            )
    if options.prompt:
        made.ask(lexicons.template(options.prompt), options.caption_length, shared=options.prompt_shared)
    return made


def _in_parts(texts: Iterable[str], size: int) -> Iterable[list[str]]:
    texts = iter(texts)
    while part := list(itertools.islice(texts, size)):
        yield part


def clean_caption(raw: bytes | str, cleaning: Cleaning = Cleaning()) -> str:
    """The visible text of a caption on one line: UTF-8, without byte order mark and NULs, each run of white space one space.

    Then what `cleaning` asks for. Only the first 16 KiB count. Raises Uncaptioned where they are not UTF-8, or where nothing is visible in them.
    """
    start = raw[:LONGEST] if isinstance(raw, bytes) else raw[:LONGEST].encode(errors="surrogatepass")[:LONGEST]
    try:
        text = start.decode()
    except UnicodeDecodeError as error:
        if len(start) < LONGEST or error.start < LONGEST - 3:
            raise Uncaptioned("undecodable", str(error)) from error
        text = start[: error.start].decode()  # the bound has cut a character in two
    text = " ".join(text.translate(INVISIBLE).split())
    if cleaning.style == "albef":
        text = albef_caption(text, cleaning.words)
    if not text:
        raise Uncaptioned("blank")
    return text


def albef_caption(text: str, words: int) -> str:
    """A caption as ALBEF and TCL clean it: lower case, no punctuation, hyphens and slashes as spaces, the first `words` words."""
    text = PUNCTUATION.sub("", text.lower()).replace("-", " ").replace("/", " ").replace("<person>", "person")
    return " ".join(re.sub(r"\s{2,}", " ", text).rstrip("\n").strip(" ").split(" ")[:words])


def albef_question(text: str, words: int) -> str:
    """A question as ALBEF and TCL clean it: as a caption, but runs of spaces stay, and each counts as a word."""
    text = PUNCTUATION.sub("", text.lower()).replace("-", " ").replace("/", " ")
    return " ".join(text.rstrip(" ").split(" ")[:words])


def prompts(templates: str | Sequence[str], classes: Sequence[str]) -> list[list[str]]:
    """The prompts of each class, from a name in PROMPTS or from templates with one "{}" each."""
    if isinstance(templates, str):
        if templates not in PROMPTS:
            raise ValueError(f"prompts is {templates!r}; it takes {', '.join(PROMPTS)} or a list of templates such as 'a photo of a {{}}'")
        templates = PROMPTS[templates]
    for template in templates:
        if template.count("{}") != 1:
            raise ValueError(f"the prompt template {template!r} must have one {{}}, where the name of the class goes")
    return [[template.replace("{}", name) for template in templates] for name in classes]
