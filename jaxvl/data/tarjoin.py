"""The parts of one sample that are named apart: joined where a shard is laid out that way throughout, by rule.

A member is named FOLDER/KEY.INFIX.EXTENSION, mostly without infix. Parts that differ in the infix are one sample

- where each kind of part has one infix of its own in all samples: KEY.photo.jpg with KEY.caption.txt, at least two of them;
- where the infix of the image is a word that only images have which are the only one of their key: KEY.orig.jpg with KEY.txt.

Parts that differ in the folder are one sample where the one folder says that it holds images, and holds no texts, and
the other the reverse: images/ with captions/. Anything else could be a sample that lost its text beside one that lost
its image, so it is two bad samples.
"""

import re
from collections.abc import Iterable, Sequence

SLOTS = ("image", "text", "json", "cls")
UNCAPTIONED = ("nocaption", "blank")  # bad as a pair, good as an image
LIMITS = {"image": 1 << 27, "text": 1 << 24, "json": 1 << 24, "cls": 1 << 10}
LEAST = 2  # samples that show that an infix is the name of a part, and not of a sample
IMAGES, TEXTS = re.compile(rb"image|img|photo|pic|jpe?g|png|webp"), re.compile(rb"caption|te?xt|descr|annot|label|prompt|title|json|meta")


class Sample:
    """The members of one stem while a tar is walked."""

    __slots__ = ("copy", "faults", "folder", "infix", "key", "members", "names", "sniffed")

    def __init__(self, folder: bytes, key: bytes, infix: bytes, copy: int) -> None:
        self.folder, self.key, self.infix, self.copy, self.sniffed = folder, key, infix, copy, False
        self.members: dict[str, tuple[int, int]] = {}  # slot -> data offset, size
        self.names: dict[str, bytes] = {}  # slot -> the base name that filled it
        self.faults: dict[str, str] = {}  # slot -> link, device, sparse, truncated, ambiguous or a format that is not read

    @property
    def bare(self) -> bool:
        """Whether it is an image and nothing else."""
        return self.names.keys() == {"image"}

    def fill(self, other: "Sample", slots: Iterable[str]) -> None:
        """Take what `other` has in `slots`."""
        for slot in slots:
            if slot in other.names and slot not in self.names:
                self.names[slot] = other.names[slot]
                if slot in other.members:
                    self.members[slot] = other.members[slot]
                if slot in other.faults:
                    self.faults[slot] = other.faults[slot]

    def refuse(self, word: str) -> None:
        """Let there be no image, for the reason `word`."""
        self.members.pop("image", None)
        self.faults["image"] = word

    def reason(self) -> str | None:
        """Why the sample is bad; None for a whole one."""
        if self.copy:
            return "duplicate"
        if "truncated" in self.faults.values():
            return "truncated"
        for slot in ("image", "text"):
            if slot in self.faults:
                return self.faults[slot]
        if "image" not in self.members:
            return "noimage"
        if any(size > LIMITS[slot] for slot, (_, size) in self.members.items()):
            return "oversized"
        if not self.members["image"][1]:
            return "empty"
        if "text" not in self.members:
            return "nocaption"
        return None if self.members["text"][1] else "blank"


def join_stems(samples: list[Sample]) -> tuple[list[Sample], bool]:
    """Join parts that differ in their infix; the samples, and whether a rule joined any."""
    groups: dict[bytes, list[Sample]] = {}
    for sample in _single(samples):
        groups.setdefault(sample.folder + sample.key, []).append(sample)
    several = [parts for parts in groups.values() if len(parts) > 1]
    if not several:
        return samples, False
    whole = [parts[0] for parts in groups.values() if len(parts) == 1 and "image" in parts[0].names and not parts[0].bare]
    rule = _infixes([*(s for parts in several for s in parts), *whole])
    if rule and sum(len({infix for infix in rule.values() if any(s.infix == infix for s in parts)}) > 1 for parts in several) < LEAST:
        rule = {}
    words = set() if rule else _words(groups.values())
    left, joined = set(), bool(rule)
    for parts in several:
        if not rule and (one := _only(parts, words)):
            one.fill(next(s for s in parts if not s.infix), SLOTS)
            gone, joined = [s for s in parts if s is not one], True
        else:
            gone = _by_rule(parts, rule) if rule else _alone(parts)
        left |= {id(s) for s in gone}
    return [s for s in samples if id(s) not in left], joined


def _single(samples: list[Sample]) -> list[Sample]:
    """The samples without a duplicate, whose parts may lie in the other."""
    again = {(s.folder, s.key, s.infix) for s in samples if s.copy}
    return [s for s in samples if (s.folder, s.key, s.infix) not in again] if again else samples


def _infixes(parts: Iterable[Sample]) -> dict[str, bytes]:
    """The infix of each kind of part; {} unless all have one, and not the same."""
    found: dict[str, set[bytes]] = {}
    bare: set[bytes] = set()
    for part in parts:
        if part.bare:
            bare.add(part.infix)
        else:
            for slot in part.names:
                found.setdefault(slot, set()).add(part.infix)
    found["image"] = found.get("image", set()) | ({b""} if b"" in bare else bare)
    if any(len(infixes) != 1 for infixes in found.values()) or len(set().union(*found.values())) == 1:
        return {}
    return {slot: min(infixes) for slot, infixes in found.items()}


def _words(groups: Iterable[Sequence[Sample]]) -> set[bytes]:
    """The infixes that are words and that only images have which are the only one of their key."""
    words, others = set[bytes](), set[bytes]()
    for parts in groups:
        images = [s for s in parts if "image" in s.names]
        for part in parts:
            (words if part.bare and len(images) == 1 else others).add(part.infix)
    return {word for word in words - others if word[1:].isalpha()}


def _only(parts: Sequence[Sample], words: set[bytes]) -> Sample | None:
    """The only image of a key, where it has one of these infixes and the text has none."""
    images = [s for s in parts if "image" in s.names]
    fits = len(images) == 1 and images[0].bare and images[0].infix in words and any(s.names and not s.infix for s in parts)
    return images[0] if fits else None


def _by_rule(parts: Sequence[Sample], rule: dict[str, bytes]) -> list[Sample]:
    """Join the parts of one key; those that are no samples any more."""
    at = {s.infix: s for s in parts}
    first = at.get(rule["image"], parts[0])
    for slot, infix in rule.items():
        if infix in at:
            first.fill(at[infix], (slot,))
    return [s for s in parts if s is not first]


def _alone(parts: Sequence[Sample]) -> list[Sample]:
    """Of the parts of one key, those that are no samples: what is beside a plain image, or all but one where none can be chosen."""
    plain = next((s for s in parts if not s.infix and "image" in s.names), None)
    bare, texts = [s for s in parts if s.bare], [s for s in parts if s.names and "image" not in s.names]
    left = [s for s in parts if not s.names]
    if plain:
        return [*left, *(s for s in bare if s is not plain), *(() if plain.bare else texts)]
    if len(bare) < 2 or not texts:
        return left
    bare[0].refuse("ambiguous")
    return [*left, *bare[1:], *texts]


def join_folders(samples: list[Sample]) -> tuple[list[Sample], bool]:
    """Join images and texts of one name in two folders that say what they hold; the samples, and whether any were joined."""
    slots: dict[bytes, set[str]] = {}
    for sample in samples:
        slots.setdefault(sample.folder, set()).update(sample.names)
    beside: dict[tuple, tuple[list[bytes], list[bytes]]] = {}  # a path with one entry left out -> folders of images, of texts
    for folder, held in slots.items():
        entries = tuple(folder.split(b"/")[:-1])
        for number, entry in enumerate(entries):
            for said, side in ((IMAGES, 0), (TEXTS, 1)):
                if said.search(entry.lower()) and ("image" in held) == (side == 0):
                    beside.setdefault((entries[:number], entries[number + 1 :]), ([], []))[side].append(folder)
    of: dict[bytes, list[bytes]] = {}  # a folder of texts -> those of its images
    for images, texts in beside.values():
        for text in texts if len(images) == 1 else ():
            if slots[text] and not any(slots[text] & slots[other] for other in (*images, *texts) if other != text):
                of.setdefault(text, []).append(images[0])
    single = _single(samples)
    pictures = {(s.folder, s.key, s.infix): s for s in single if "image" in s.names}
    left = set()
    for sample in single:
        for folder in of.get(sample.folder, ()) if len(of.get(sample.folder, ())) == 1 else ():
            if picture := pictures.get((folder, sample.key, sample.infix)):
                picture.fill(sample, sample.names)
                left.add(id(sample))
    return [s for s in samples if id(s) not in left], bool(left)
