"""The samples of a tar: its members put together by key, and what is wrong with each.

A member is named FOLDER/STEM.EXTENSION. Members of one folder and stem form a sample, wherever in the tar they are;
its key is the stem up to its first dot. What is wrong with a sample is found here as far as names and sizes tell, as
a one-word reason:

| in the tar                                               | in the index                                           |
|----------------------------------------------------------|--------------------------------------------------------|
| KEY.jpg .jpeg .png .webp .gif .bmp .tif ..., in any case | the image; decoded by content, not by name             |
| no such name, but a member that begins like an image     | the image                                              |
| the image is of a format that is not read (formats.py)   | the word of that format: "jxl", "heic", "svg", ...     |
| KEY.txt .text .caption                                   | the main caption                                       |
| KEY.json                                                 | fields, further captions                               |
| KEY.cls                                                  | field "cls"                                            |
| KEY.jpg and KEY.png                                      | the first is the image                                 |
| KEY.a.jpg with KEY.a.txt, KEY.b.jpg with KEY.b.txt       | two samples with one key                               |
| KEY.a.jpg without KEY.a.txt                              | the image of KEY where it has none, else left aside    |
| image and text of a key, each alone in a folder          | one sample                                             |
| the same member name again                               | a further sample, "duplicate"; the first is used       |
| names that begin with a dot or have none, folders        | no sample                                              |
| "./", "../", absolute names                              | the folder is a label too; nothing is ever written     |
| any member of the sample cut short                       | "truncated"                                            |
| no image / no text                                       | "noimage" / "nocaption"; the latter is still an image  |
| image or text of no bytes                                | "empty" / "blank"                                      |
| image or text that is a link / FIFO or device / sparse   | "link" / "device" / "sparse"                           |
| image above 128 MiB, text or json above 16 MiB           | "oversized"                                            |
"""

from collections.abc import Iterable

from jaxvl.data import formats
from jaxvl.data.tarwalk import Damage, Member

SLOTS = ("image", "text", "json", "cls")
IMAGES = (
    "jpg", "jpeg", "jpe", "jfif", "png", "webp", "gif", "bmp", "tif", "tiff", "ppm", "pgm", "jp2", "avif", "ico", "img", "image",
)  # fmt: skip
EXTENSIONS = dict.fromkeys(IMAGES, "image") | {
    "txt": "text",
    "text": "text",
    "caption": "text",
    "json": "json",
    "cls": "cls",
}
UNCAPTIONED = ("nocaption", "blank")  # bad as a pair, good as an image
LIMITS = {"image": 1 << 27, "text": 1 << 24, "json": 1 << 24, "cls": 1 << 10}


class Sample:
    """The members of one stem while a tar is walked."""

    __slots__ = ("copy", "faults", "key", "members", "names", "plain", "sniffed")

    def __init__(self, key: bytes, plain: bool, copy: int) -> None:
        self.key, self.plain, self.copy, self.sniffed = key, plain, copy, False
        self.members: dict[str, tuple[int, int]] = {}  # slot -> data offset, size
        self.names: dict[str, bytes] = {}  # slot -> the base name that filled it
        self.faults: dict[str, str] = {}  # slot -> link, device, sparse, truncated or a format that is not read

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


def group(entries: Iterable[Member | Damage]) -> tuple[list[Sample], tuple[str, ...]]:
    """The samples that the members of a tar form, ordered by first member, and the reasons of its damage."""
    samples: list[Sample] = []
    latest: dict[bytes, Sample] = {}
    folders: dict[bytes, list[Sample]] = {}
    damage: list[str] = []
    for entry in entries:
        if isinstance(entry, Damage):
            damage.append(entry.reason)
            continue
        path = entry.name.removeprefix(b"./")
        base = path[path.rfind(b"/") + 1 :]
        key, dot, _ = base.partition(b".")
        if not key or not dot:
            continue
        stem, _, extension = path.rpartition(b".")
        sample = latest.get(stem)
        if sample is None or base in sample.names.values():
            plain = len(stem) == len(path) - len(base) + len(key)
            sample = latest[stem] = Sample(key, plain, sample.copy + 1 if sample else 0)
            samples.append(sample)
            folders.setdefault(path[: len(path) - len(base)] + key, []).append(sample)
        _place(sample, entry, base, extension.lower().decode("utf-8", "replace"))
    left = set()
    for alike in folders.values():
        if len(alike) > 1:
            left |= _join_stems(alike)
    samples = [s for s in samples if id(s) not in left]
    left = _join_folders(samples)
    return [s for s in samples if id(s) not in left], tuple(damage)


def _place(sample: Sample, member: Member, base: bytes, extension: str) -> None:
    slot = EXTENSIONS.get(extension)
    looks = formats.sniff(member.head) if slot in (None, "image") and member.kind == "file" else ""
    sniffed = slot is None and (looks not in ("", "PPM", "ICO") or (extension in formats.EXTENSIONS and member.kind == "file"))
    if sniffed:
        slot = "image"
    if slot is None or (slot in sample.names and (sniffed or slot != "image" or not sample.sniffed)):
        return
    sample.names[slot] = base
    sample.members.pop(slot, None)
    sample.faults.pop(slot, None)
    if slot == "image":
        sample.sniffed = sniffed  # a member that is called an image comes before one that only looks it
    if member.kind != "file":
        sample.faults[slot] = member.kind
    elif member.truncated:
        sample.faults[slot] = "truncated"
    else:
        sample.members[slot] = (member.offset, member.size)
        word = looks or formats.EXTENSIONS.get(extension, "")
        if slot == "image" and member.size and word in formats.UNREAD:
            sample.faults[slot] = word


def _fill(sample: Sample, other: Sample) -> None:
    """Give `sample` what it lacks and `other` has."""
    for slot in other.names.keys() - sample.names.keys():
        sample.names[slot] = other.names[slot]
        if slot in other.members:
            sample.members[slot] = other.members[slot]
        if slot in other.faults:
            sample.faults[slot] = other.faults[slot]


def _join_stems(alike: list[Sample]) -> set[int]:
    """Of samples with one folder and key, fill the plain one from those that are no pair; ids of what is left aside."""
    parts = [s for s in alike if not s.copy and (s.plain or not {"image", "text"} <= s.names.keys())]
    parts.sort(key=lambda s: not s.plain)
    for other in parts[1:]:
        _fill(parts[0], other)
    return {id(s) for s in parts[1:]}


def _join_folders(samples: list[Sample]) -> set[int]:
    """Join an image and a text that stand alone, each in its own folder, under one key; ids of the texts."""
    lone: dict[bytes, list[Sample]] = {}
    for sample in samples:
        if not sample.copy and len(sample.names) == 1:
            lone.setdefault(sample.key, []).append(sample)
    joined = set()
    for alike in lone.values():
        images, texts = ([s for s in alike if slot in s.names] for slot in ("image", "text"))
        if len(images) == len(texts) == 1:
            _fill(images[0], texts[0])
            joined.add(id(texts[0]))
    return joined
