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
| KEY.jpg and KEY.a.jpg without KEY.a.txt                  | the first is the image, the other is left aside        |
| KEY.1.jpg with KEY.2.txt, or with KEY.txt                | "nocaption" and "noimage"                              |
| KEY.a.jpg with KEY.b.txt, or with KEY.txt, throughout    | one sample each, "joined" (tarjoin.py)                 |
| KEY.a.jpg, KEY.b.jpg and KEY.txt, or no image extension  | "ambiguous"                                            |
| images/KEY.jpg with captions/KEY.txt, throughout         | one sample each, "joined"                              |
| cats/KEY.jpg with dogs/KEY.txt                           | "nocaption" and "noimage"                              |
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
from jaxvl.data.tarjoin import Sample, join_folders, join_stems
from jaxvl.data.tarwalk import Damage, Member

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


def group(entries: Iterable[Member | Damage]) -> tuple[list[Sample], tuple[str, ...]]:
    """The samples that the members of a tar form, ordered by first member, and the words for its damage and for how it is laid out."""
    samples: list[Sample] = []
    latest: dict[bytes, Sample] = {}
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
            folder = path[: len(path) - len(base)]
            sample = latest[stem] = Sample(folder, key, stem[len(folder) + len(key) :], sample.copy + 1 if sample else 0)
            samples.append(sample)
        _place(sample, entry, base, extension.lower().decode("utf-8", "replace"))
    samples, by_stem = join_stems(samples)
    samples, by_folder = join_folders(samples)
    return samples, (*damage, *["joined"] * (by_stem or by_folder))


def _place(sample: Sample, member: Member, base: bytes, extension: str) -> None:
    slot = EXTENSIONS.get(extension)
    looks = formats.sniff(member.head) if slot in (None, "image") and member.kind == "file" else ""
    sniffed = slot is None and (looks not in ("", "PPM", "ICO") or (extension in formats.EXTENSIONS and member.kind == "file"))
    if sniffed:
        slot = "image"
    if slot is None:
        return
    if slot in sample.names and (sniffed or slot != "image" or not sample.sniffed):
        if sniffed and sample.sniffed:
            sample.refuse("ambiguous")
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
