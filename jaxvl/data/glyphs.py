"""The embedded set: characters drawn in the fonts that ship inside matplotlib, captioned by their Unicode names.

    write_shards("glyphs", "train", size=20_000)      # glyphs/train-0000.tar ... and glyphs/train-triplets.jsonl

Nothing is downloaded and nothing is stored with the project, yet the shards have the layout of a real set (KEY.png, KEY.txt,
KEY.json), so a first run takes the path of the thousandth. Three parts share no picture, pixel by pixel, and no part has one twice:

- `train`: every face of each character, except one that is kept back where there are three or more;
- `val-seen`: the faces that were kept back, so characters of `train` in faces it does not show for them;
- `val`: characters whose letter `train` never shows (accented, capital and typographic forms stay with their letter).

Characters come in one order for all parts and sizes, ASCII and those that many faces draw first, so a smaller set is
contained in a larger one. A `train` of N images covers the characters of a `val-seen` of about N / 14.
"""

import hashlib
import io
import itertools
import json
import os
import pathlib
import tarfile
import unicodedata
from collections import defaultdict
from collections.abc import Iterator
from functools import cache
from typing import NamedTuple

import matplotlib
from matplotlib.ft2font import FT2Font
from PIL import Image, ImageDraw, ImageFont

from jaxvl.new_files import new_files

PARTS = {"train": 6_000, "val": 500, "val-seen": 420}  # images in a part when no size is given
VAL_SHARE = 1 / 6  # of the letters
VAL_FACES = 4  # faces of a character that `val` shows: more would fill a small part with few characters
SHARD = 1_000  # images in a shard
EM, BASELINE, MARGIN = 0.6, 0.74, 0.025  # of the picture's side: font size, height of the baseline, empty border

# The first word of a letter's Unicode name is its script; in these names it is a shape, a use or a typographic variant.
NOT_SCRIPTS = {"mathematical", "modifier", "double-struck", "black-letter", "script", "fraktur", "feminine", "masculine", "n-ary"}
KINDS = {"N": "number", "P": "punctuation", "S": "symbol", "L": "letter"}


class Face(NamedTuple):
    file: str
    font: str
    style: str
    bold: bool
    slanted: bool

    @property
    def phrase(self) -> str:
        return self.style + " bold" * self.bold + " oblique" * self.slanted


class Glyph(NamedTuple):
    char: str
    face: Face
    picture: bytes  # uint8 [pixels, pixels] row by row, black on white

    @property
    def key(self) -> str:
        return f"u{ord(self.char):05x}-{self.face.phrase.lower().replace(' ', '-')}"


def _family(font: str, file: str, style: str, suffixes: str) -> list[Face]:
    variants = itertools.product((False, True), (False, True))
    return [Face(f"{file}{suffix}.ttf", font, style, *v) for suffix, v in zip(suffixes.split(","), variants, strict=True)]


FACES: tuple[Face, ...] = (
    *_family("DejaVu Sans", "DejaVuSans", "sans serif", ",-Oblique,-Bold,-BoldOblique"),
    *_family("DejaVu Serif", "DejaVuSerif", "serif", ",-Italic,-Bold,-BoldItalic"),
    *_family("DejaVu Sans Mono", "DejaVuSansMono", "monospace", ",-Oblique,-Bold,-BoldOblique"),
    *_family("STIX General", "STIXGeneral", "STIX serif", ",Italic,Bol,BolIta"),
)
LICENCES = {"D": "Bitstream Vera / DejaVu font licence (rendering)", "S": "STIX font licence, OFL-1.1 (rendering)"}


def write_shards(folder: str | os.PathLike, part: str, size: int | None = None, pixels: int = 40, seed: int = 0) -> list[pathlib.Path]:
    """Writes PART-NNNN.tar and PART-triplets.jsonl into `folder` and returns the shards' paths.

    The same arguments give the same bytes (with the same fonts and FreeType); `seed` chooses the letters of `val`, the faces
    kept back and the order. `pixels` is the side of the square pictures.

    Raises ValueError for an unknown part, a size that the fonts cannot fill, or pictures too small or large to draw, and
    FileExistsError where the folder holds shards of a larger part, which would be read together with the new ones.
    """
    if part not in PARTS:
        raise ValueError(f"glyphs has no part {part!r}: choose one of {', '.join(PARTS)}")
    if not 16 <= pixels <= 512:
        raise ValueError(f"glyphs: pixels={pixels} must lie between 16 and 512")
    size = PARTS[part] if size is None else size
    if size < 1:
        raise ValueError(f"glyphs: size={size} must be at least 1")
    chosen = list(itertools.islice(glyphs(part, pixels, seed), size))
    if len(chosen) < size:
        raise ValueError(f"glyphs: size={size} is more than the {len(chosen)} pictures of part {part!r}")
    chosen.sort(key=lambda glyph: _keyed(seed, "shuffle", glyph.key))

    folder = pathlib.Path(folder)
    paths = [folder / f"{part}-{i:04d}.tar" for i in range(-(-size // SHARD))]
    stale = sorted(set(folder.glob(f"{part}-[0-9][0-9][0-9][0-9].tar")) - set(paths))
    if stale:
        raise FileExistsError(f"{folder} holds {stale[0].name} of a larger {part!r}: remove it or choose an empty folder")
    listed = folder / f"{part}-triplets.jsonl"
    with new_files(folder, [*paths, listed]):
        for path, start in zip(paths, range(0, size, SHARD), strict=True):
            _write(path, _tar(chosen[start : start + SHARD], pixels))
        _write(listed, "".join(json.dumps(triplet) + "\n" for triplet in triplets(chosen)).encode())
    return paths


def glyphs(part: str, pixels: int = 40, seed: int = 0) -> Iterator[Glyph]:
    """The pictures of a part, in an order that does not depend on how many are taken."""
    return (glyph for of, glyph in drawn(pixels, seed) if of == part)


def drawn(pixels: int = 40, seed: int = 0) -> Iterator[tuple[str, Glyph]]:
    """Every picture with the part it belongs to, character by character."""
    seen: set[bytes] = set()
    for char, faces in _characters(seed):
        pictures = []
        for face in faces:
            picture = draw(char, face, pixels)
            if picture is not None and picture not in seen:  # Latin A and Greek Alpha, an arrow in bold and regular
                seen.add(picture)
                pictures.append(Glyph(char, face, picture))
        pictures.sort(key=lambda glyph: _keyed(seed, "face", glyph.key))
        if _keyed(seed, "letter", letter(char)) < VAL_SHARE:
            yield from (("val", glyph) for glyph in pictures[:VAL_FACES])
        elif len(pictures) >= 3:
            yield "val-seen", pictures[0]
            yield from (("train", glyph) for glyph in pictures[1:])
        else:
            yield from (("train", glyph) for glyph in pictures)


def draw(char: str, face: Face, pixels: int) -> bytes | None:
    """The character black on white with its ink in the middle and its foot on a common baseline; None if it leaves no ink.

    A character too large for the picture at the common size is drawn smaller, so nothing is ever cut off.
    """
    base, margin = round(BASELINE * pixels), max(1, round(MARGIN * pixels))
    for size in range(round(EM * pixels), 0, -1):
        font = _font(face.file, size)
        left, top, right, bottom = font.getbbox(char, anchor="ls")
        if right <= left or bottom <= top:
            return None
        if right - left <= pixels - 2 * margin and -top <= base - margin and bottom <= pixels - margin - base:
            break
    image = Image.new("L", (pixels, pixels), 255)
    ImageDraw.Draw(image).text(((pixels - right - left) // 2, base), char, fill=0, font=font, anchor="ls")
    return image.tobytes() if min(image.tobytes()) < 128 else None


def letter(char: str) -> str:
    """What a character is a form of: its plain lower-case letter, or itself (a for Á, ª and 𝐀; o for ø)."""
    plain = unicodedata.normalize("NFKD", char)[0]
    return unicodedata.lookup(base_name(plain)).lower()


def base_name(char: str) -> str:
    """The Unicode name without accents, strokes and tails: "latin small letter o" for ò and ø."""
    name = unicodedata.name(char).lower()
    plain = unicodedata.name(unicodedata.normalize("NFD", char)[0]).lower().split(" with ")[0]
    try:
        unicodedata.lookup(plain)
    except KeyError:
        return name
    return plain


def script(char: str) -> str:
    first = unicodedata.name(char).lower().split()[0]
    kind = unicodedata.category(char)[0]
    return KINDS[kind] if kind != "L" or first in NOT_SCRIPTS else first


def triplets(chosen: list[Glyph]) -> Iterator[dict[str, str]]:
    """Changes of one property that lead from a picture to another of the same list: weight, slant, family, case, accent."""
    at = {(g.char, g.face): g for g in chosen}
    plain, accented = {}, defaultdict(list)
    for char in dict.fromkeys(g.char for g in chosen if unicodedata.category(g.char)[0] == "L"):
        name, base = unicodedata.name(char).lower(), base_name(char)
        if name != base:
            plain[char] = unicodedata.lookup(base)
            accented[plain[char]].append((char, name.split(" with ")[-1]))
    styles = list(dict.fromkeys(face.style for face in FACES))
    for char, face in at:
        changes = [
            ("weight", "make it regular weight" if face.bold else "make it bold", char, face._replace(bold=not face.bold)),
            ("slant", "make it upright" if face.slanted else "make it oblique", char, face._replace(slanted=not face.slanted)),
            *(("family", f"in a {style} face", char, face._replace(style=style)) for style in styles if style != face.style),
        ]
        if len(char.swapcase()) == 1 and char.swapcase() != char:
            changes.append(("case", f"make it a {'small' if char.isupper() else 'capital'} letter", char.swapcase(), face))
        if char in plain:
            changes.append(("accent", "remove the accents", plain[char], face))
        changes += [("accent", f"add {accent}", other, face) for other, accent in accented[char]]
        for kind, modification, other, style in changes:
            target = at.get((other, _FACE_OF[style.style, style.bold, style.slanted]))
            if target is not None:
                yield {"reference": at[char, face].key, "modification": modification, "target": target.key, "kind": kind}


_FACE_OF = {(face.style, face.bold, face.slanted): face for face in FACES}


def _characters(seed: int) -> list[tuple[str, list[Face]]]:
    """Every named letter, number, sign and symbol with the faces that have a glyph for it."""
    faces = defaultdict(list)
    for face in FACES:
        for code in FT2Font(str(_path(face.file))).get_charmap():  # a code without a glyph (.notdef) is not in the map
            char = chr(code)
            if unicodedata.category(char)[0] in KINDS and unicodedata.name(char, "") != "":
                faces[char].append(face)
    return sorted(faces.items(), key=lambda item: (not item[0].isascii(), -len(item[1]), _keyed(seed, "character", item[0])))


def _tar(chosen: list[Glyph], pixels: int) -> bytes:
    out = io.BytesIO()
    with tarfile.open(fileobj=out, mode="w", format=tarfile.USTAR_FORMAT) as tar:
        for glyph in chosen:
            meta = _meta(glyph, pixels)
            text = json.dumps(meta, ensure_ascii=False, separators=(",", ":"))
            for suffix, data in ("png", _png(glyph.picture, pixels)), ("txt", meta["captions"][0].encode()), ("json", text.encode()):
                member = tarfile.TarInfo(f"{glyph.key}.{suffix}")  # its time and owner are zero: same bytes every time
                member.size = len(data)
                tar.addfile(member, io.BytesIO(data))
    return out.getvalue()


def _meta(glyph: Glyph, pixels: int) -> dict:
    char, face = glyph.char, glyph.face
    name = unicodedata.name(char).lower()
    return {
        "set": "glyphs",
        "class": name,
        "hierarchy": [script(char), unicodedata.category(char), base_name(char), name],
        "captions": [f"{name}, {face.phrase}", name],
        "codepoint": f"U+{ord(char):04X}",
        "font": face.font,
        "style": face.style,
        "weight": "bold" if face.bold else "regular",
        "slant": "oblique" if face.slanted else "upright",
        "licence": LICENCES[face.font[0]],
        "credit": face.font,
        "source": "font rendering; text from Unicode character names",
        "width": pixels,
        "height": pixels,
    }


def _png(picture: bytes, pixels: int) -> bytes:
    out = io.BytesIO()
    Image.frombytes("L", (pixels, pixels), picture).save(out, "PNG", compress_level=6)
    return out.getvalue()


def _write(path: pathlib.Path, data: bytes) -> None:
    part = path.with_name(f".{path.name}.{os.getpid()}")  # a reader, or a second writer, never sees half a file
    try:
        part.write_bytes(data)
        os.replace(part, path)
    finally:
        part.unlink(missing_ok=True)


def _path(file: str) -> pathlib.Path:
    return pathlib.Path(matplotlib.get_data_path(), "fonts", "ttf", file)


@cache
def _font(file: str, size: int) -> ImageFont.FreeTypeFont:
    return ImageFont.truetype(_path(file), size, layout_engine=ImageFont.Layout.BASIC)


def _keyed(seed: int, *what: str) -> float:
    """A number in [0, 1) that depends on nothing but the arguments."""
    digest = hashlib.blake2b("/".join((str(seed), *what)).encode(), digest_size=8).digest()
    return int.from_bytes(digest, "big") / 2**64
