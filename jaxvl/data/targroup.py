"""The samples of a tar: its members put together by key, and what is wrong with each.

A sample is the set of members with one key: the base name up to its first dot, in one folder of the tar. They need not
follow one another. What is wrong with a sample is found here as far as names and sizes tell, each with a one-word reason:

| in the tar                                                    | in the index                                                  |
|---------------------------------------------------------------|---------------------------------------------------------------|
| KEY.jpg .jpeg .png .webp .gif .bmp .tif ..., any letter case   | the image; decoded by content, not by name                    |
| no such name, but another member that begins like an image    | the image                                                     |
| KEY.txt .text .caption                                        | the main caption                                              |
| KEY.json                                                      | fields, further captions                                      |
| KEY.cls                                                       | field "cls"                                                   |
| image and text of one name in two folders, each alone there    | one sample                                                    |
| KEY.x.jpg next to KEY.jpg                                     | the shorter name is taken                                     |
| the same member name again                                    | a further sample with reason "duplicate"; the first one stays |
| names that begin with a dot or have none, folders             | no sample                                                     |
| "./", "../", absolute names                                   | the folder is a label too; nothing is ever written            |
| any member of the sample cut short                            | "truncated"                                                   |
| no image / no text                                            | "noimage" / "nocaption": still an image for who needs no text |
| image or text of no bytes                                     | "empty" / "blank"                                             |
| image or text that is a link / FIFO or device / sparse        | "link" / "device" / "sparse"                                  |
| image above 256 MiB, text or json above 16 MiB                | "oversized"                                                   |
"""

from collections.abc import Iterable

from jaxvl.data.tarwalk import Damage, Member

SLOTS = ("image", "text", "json", "cls")
IMAGES = ("jpg", "jpeg", "jpe", "jfif", "png", "webp", "gif", "bmp", "tif", "tiff", "ppm", "pgm", "jp2", "avif", "ico", "img", "image")
EXTENSIONS = dict.fromkeys(IMAGES, "image") | {"txt": "text", "text": "text", "caption": "text", "json": "json", "cls": "cls"}
HEADS = (b"\xff\xd8\xff", b"\x89PNG\r\n", b"GIF8", b"BM", b"II*\0", b"MM\0*", b"\0\0\0\x0cjP")  # of members by any other name
UNCAPTIONED = ("nocaption", "blank")  # bad as a pair, good as an image
LIMITS = {"image": 1 << 28, "text": 1 << 24, "json": 1 << 24, "cls": 1 << 10}


class Sample:
    """The members of one key while a tar is walked."""

    __slots__ = ("copy", "faults", "key", "members", "names", "ranks")

    def __init__(self, key: bytes, copy: int) -> None:
        self.key, self.copy = key, copy
        self.members: dict[str, tuple[int, int]] = {}  # slot -> data offset, size
        self.names: dict[str, bytes] = {}  # slot -> the base name that filled it
        self.ranks: dict[str, int] = {}  # slot -> how far that name is from plain KEY.jpg
        self.faults: dict[str, str] = {}  # slot -> link, device, sparse or truncated

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
    """The samples that the members of a tar form, in the order of their first members, and the reasons of its damage."""
    samples: list[Sample] = []
    latest: dict[bytes, Sample] = {}
    damage: list[str] = []
    for entry in entries:
        if isinstance(entry, Damage):
            damage.append(entry.reason)
            continue
        folder, _, base = entry.name.removeprefix(b"./").rpartition(b"/")
        key, dot, extension = base.partition(b".")
        if not key or not dot:
            continue
        stem = folder + b"/" + key
        sample = latest.get(stem)
        if sample is None or base in sample.names.values():
            sample = latest[stem] = Sample(key, sample.copy + 1 if sample else 0)
            samples.append(sample)
        _place(sample, entry, base, extension.lower().decode("utf-8", "replace"))
    return _join_folders(samples), tuple(damage)


def _place(sample: Sample, member: Member, base: bytes, extension: str) -> None:
    slot, rank = EXTENSIONS.get(extension.rpartition(".")[2]), extension.count(".")
    if slot is None and member.kind == "file" and _begins_like_image(member.head):
        slot, rank = "image", 99  # any member that is called an image comes before one that only looks it
    if slot is None or rank >= sample.ranks.get(slot, 100):
        return
    sample.names[slot], sample.ranks[slot] = base, rank
    sample.members.pop(slot, None)
    sample.faults.pop(slot, None)
    if member.kind != "file":
        sample.faults[slot] = member.kind
    elif member.truncated:
        sample.faults[slot] = "truncated"
    else:
        sample.members[slot] = (member.offset, member.size)


def _begins_like_image(head: bytes) -> bool:
    return head.startswith(HEADS) or head[8:12] == b"WEBP" or head[4:12] in (b"ftypavif", b"ftypheic")


def _join_folders(samples: list[Sample]) -> list[Sample]:
    """Join an image and a text that stand alone, each in its own folder, under one key."""
    lone: dict[bytes, list[Sample]] = {}
    for sample in samples:
        if not sample.copy and len(sample.names) == 1 and sample.reason() in ("noimage", "nocaption"):
            lone.setdefault(sample.key, []).append(sample)
    gone = set()
    for alike in lone.values():
        images = [s for s in alike if "image" in s.members]
        texts = [s for s in alike if "text" in s.members]
        if len(images) == len(texts) == 1:
            images[0].members |= texts[0].members
            gone.add(id(texts[0]))
    return [s for s in samples if id(s) not in gone]
