"""Lists that people write - CSV, TSV, JSON, lines of JSON, lines of text - read strictly: each fault is told with file and line.

A list is UTF-8, with or without a byte order mark, or UTF-16 or UTF-32 with one. Of a table the first line names the columns, every
other row has as many, and quotes are closed; nothing is guessed of a row that does not fit.
"""

import codecs
import csv
import io
import itertools
import json
import os
import posixpath
import unicodedata
from collections.abc import Callable, Iterable, Iterator
from pathlib import Path
from typing import IO, Any, NamedTuple

from jaxvl.data.targroup import IMAGES
from jaxvl.manifest import open_regular

LISTS = (".csv", ".tsv", ".json", ".jsonl")  # files of rows, by their ending; a .txt is one where its first line names columns
WIDE = {codecs.BOM_UTF32_LE: "utf-32", codecs.BOM_UTF32_BE: "utf-32", codecs.BOM_UTF16_LE: "utf-16", codecs.BOM_UTF16_BE: "utf-16"}


class Row(NamedTuple):
    """where: "FILE:LINE", or "FILE, entry N" of a JSON list. fields: by column or key."""

    where: str
    fields: dict[str, Any]


def lines(file: IO[bytes], name: object) -> Iterator[tuple[int, str]]:
    """(number from 1, text with its line end) of an open file; lines end in LF, CR LF or CR.

    Raises ValueError naming the line that is in another encoding or holds a NUL.
    """
    number = 0
    for raw in file:
        whole = next((encoding for mark, encoding in WIDE.items() if not number and raw.startswith(mark)), "")
        try:
            text = (raw + file.read()).decode(whole) if whole else raw.removeprefix(b"" if number else codecs.BOM_UTF8).decode()
        except UnicodeDecodeError as error:
            told = f"byte 0x{error.object[error.start]:02x} in column {error.start + 1}"
            raise ValueError(f"{name}:{number + 1} is not {whole or 'UTF-8'} ({told}); save it as UTF-8") from None
        for line in io.StringIO(text, newline=""):
            number += 1
            if "\0" in line:
                raise ValueError(f"{name}:{number} holds a NUL, so it is damaged or UTF-16 without its byte order mark; save it as UTF-8")
            yield number, line


def text_lines(path: Path) -> Iterator[tuple[int, str]]:
    """(number from 1, text) of the lines of a file that are not blank, without their ends."""
    with open_regular(path) as file:
        yield from ((number, line.rstrip("\r\n")) for number, line in lines(file, path) if line.strip())


def read_json(path: Path) -> Any:
    """The value in a file of JSON. Raises ValueError with the line of what is none."""
    with open_regular(path) as file:
        return parse("".join(line for _, line in lines(file, path)), path)


def read_object(path: Path, *needs: str) -> dict[str, Any]:
    """The object in a file of JSON. Raises ValueError where it is none, or lacks one of the keys that it `needs`."""
    found = _object(read_json(path), str(path))
    if missing := [key for key in needs if key not in found]:
        raise ValueError(f"{path} has no {missing[0]}; it has {', '.join(found) or 'nothing'}")
    return found


def parse(text: str, name: object, first: int = 1) -> Any:
    """The JSON value of `text`, which begins in line `first` of `name`. Raises ValueError where it is none, or names a key twice."""
    try:
        return json.loads(text, object_pairs_hook=_once)
    except json.JSONDecodeError as error:
        told = f"{error.msg}, column {error.colno}"
        raise ValueError(f"{name}:{first + error.lineno - 1} is no JSON ({told}); was the file cut, or is it of another kind?") from None
    except (ValueError, RecursionError) as error:
        raise ValueError(f"{name}:{first} is no JSON that can be used ({error})") from None


def rows(path: Path) -> Iterator[Row]:
    """The rows of a list, by its ending: .jsonl, .json (a list of objects), .tsv, .csv, or .txt as one of the last two."""
    if path.suffix == ".json":
        yield from entries(read_json(path), str(path))
        return
    with open_regular(path) as file:
        if path.suffix != ".jsonl":
            yield from _table(lines(file, path), path)
            return
        for number, line in lines(file, path):
            if line.strip():
                where = f"{path}:{number}"
                yield Row(where, _object(parse(line, path, number), where))


def entries(values: Any, name: str) -> Iterator[Row]:
    """The objects of a JSON list called `name`."""
    if not isinstance(values, list):
        raise ValueError(f"{name} holds {kind(values)}; it must be a list of objects")
    for number, value in enumerate(values, 1):
        where = f"{name}, entry {number}"
        yield Row(where, _object(value, where))


def column(row: Row, known: Iterable[str]) -> str:
    """The first of the names `known` that the row has a value under. Raises ValueError where it has none."""
    found = next((name for name in known if name in row.fields), None)
    if found is None:
        raise ValueError(f"{row.where} has {', '.join(row.fields) or 'nothing'}; it needs one of {', '.join(known)}")
    return found


def find(name: str, root: Path, there: Callable[[str], bool]) -> str | None:
    """The path of a file below `root`, parted by "/", that a list calls `name`: with "./", "..", backslashes or in full, in either Unicode form.

    there: whether a file has a path. None where none has, or where `name` leads out of `root`.
    """
    for written in dict.fromkeys((name, name.strip().replace("\\", "/"))):
        for path in _below(written, root):
            for form in dict.fromkeys((path, unicodedata.normalize("NFC", path), unicodedata.normalize("NFD", path))):
                if there(form):
                    return form
    return None


def _below(written: str, root: Path) -> list[str]:
    """What a path is relative to `root`, which may be a link; nothing where it leads elsewhere."""
    plain = posixpath.normpath(written)
    if not plain.startswith("/") and plain.split("/")[0] != "..":
        return [plain]
    bases = dict.fromkeys((os.path.abspath(root), os.path.realpath(root)))
    whole = ((posixpath.normpath(posixpath.join(base, written)), base + "/") for base in bases)
    return [path.removeprefix(base) for path, base in whole if path.startswith(base)]


def kind(value: Any) -> str:
    """What a JSON value is, for messages."""
    names = {type(None): "null", bool: "a truth value", str: "a text", dict: "an object", list: "a list"}
    return names.get(type(value), "a number")


def _table(numbered: Iterator[tuple[int, str]], path: Path) -> Iterator[Row]:
    texts = (text for _, text in numbered)
    top = next(texts, "")
    delimiter = "\t" if path.suffix == ".tsv" or (path.suffix == ".txt" and "\t" in top) else ","
    reader = csv.reader(itertools.chain((top,), texts), delimiter=delimiter, strict=True)
    header: list[str] = []
    while True:
        where = f"{path}:{reader.line_num + 1}"
        try:
            row = next(reader, None)
        except csv.Error as error:
            raise ValueError(f"{where} is no row of a table ({error}); is a quote left open, or not doubled?") from None
        if row is None:
            return
        if not "".join(row).strip() and len(row) < 2:
            continue
        if not header:
            header = [name.strip() for name in row]
            if twice := [name for name in header if header.count(name) > 1]:
                raise ValueError(f"{where} names the column {twice[0]!r} twice")
            continue
        if len(row) != len(header):
            told = f"{len(row)} columns, not the {len(header)} of {', '.join(header)}"
            raise ValueError(f"{where} has {told}; a text with a {'tab' if delimiter != ',' else 'comma'} needs quotes")
        if _swallowed(row, delimiter):
            raise ValueError(f"{where} runs over lines that are rows by themselves; a quote is left open")
        yield Row(where, dict(zip(header, row, strict=True)))


def _swallowed(row: list[str], delimiter: str) -> bool:
    """Whether a text of several lines holds the name of an image as a cell, so that it is rows of the list and no text."""
    inside = (line.split(delimiter) for text in row if len(text.splitlines()) > 1 for line in text.splitlines())
    cells = (cell.strip(' "').lower() for some in inside if len(some) > 1 for cell in some)
    return any(cell.endswith(tuple(f".{ending}" for ending in IMAGES)) for cell in cells)


def _object(value: Any, where: str) -> dict[str, Any]:
    if not isinstance(value, dict):
        raise ValueError(f"{where} holds {kind(value)}; it must be an object")
    return value


def _once(pairs: list[tuple[str, Any]]) -> dict[str, Any]:
    found = dict(pairs)
    if len(found) < len(pairs):
        names = [name for name, _ in pairs]
        raise ValueError(f"it names {next(n for n in names if names.count(n) > 1)!r} twice in one object")
    return found
