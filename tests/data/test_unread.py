"""Pictures of formats that are not read are named by every command that meets them, and pictures that lack little are noted."""

import io
import json
from pathlib import Path

import pytest
from odd_images import encode, photo, samsung
from PIL import features
from shards import options, tar_bytes

from jaxvl.data import tools
from jaxvl.data.stream import open_data

HEIC = b"\0\0\0\x18ftypheic\0\0\0\0mif1heic" + bytes(100)
JXL, JPEG = b"\xff\x0a" + bytes(100), encode(photo())


def checked(folder: Path, entries: dict[str, bytes], capsys: pytest.CaptureFixture, verb=tools.check) -> dict:
    captions = {f"{name.partition('.')[0]}.txt": b"words" for name in entries}
    (folder / "0.tar").write_bytes(tar_bytes(list((entries | captions).items())))
    verb([str(folder / "0.tar")], json=True, indexes=str(folder / "index"))
    return json.loads(capsys.readouterr().out)


def test_an_index_names_what_its_images_are(tmp_path: Path, capsys: pytest.CaptureFixture) -> None:
    entries = {
        "a.jpg": JPEG, "b.jxl": JXL, "c.heic": HEIC, "d.jpg": HEIC, "e.heic": JPEG, "f.svg": b"<?xml version='1.0'?>" + bytes(200),
        "g.psd": b"8BPS\0\1", "g.jpg": JPEG, "h.tga": bytes(90), "i.bin": JXL, "j.svg": b"",
    }  # fmt: skip
    found = checked(tmp_path, entries, capsys, tools.index)["shards"][0]
    assert found["good"] == 3  # a, e and g: content rules, and a name that is read comes first
    assert {reason: sorted(keys) for reason, keys in found["bad"].items()} == {
        "jxl": ["b", "i"], "heic": ["c", "d"], "svg": ["f"], "tga": ["h"], "empty": ["j"],
    }  # fmt: skip


def test_check_notes_images_that_lack_only_their_end_mark(tmp_path: Path, capsys: pytest.CaptureFixture) -> None:
    odd = {"b.jpg": JPEG[:-2] + bytes(99), "c.jpg": JPEG[:-2] + samsung(), "d.jpg": JPEG[:-40] + bytes(99)}
    found = checked(tmp_path, {"a.jpg": JPEG} | odd, capsys)
    assert found["good"] == 3 and found["reasons"] == {"truncated": 1} and found["notes"] == {"noend": 2}
    tools.check([str(tmp_path / "0.tar")], indexes=str(tmp_path / "index"))
    assert "noend, 2 images" in capsys.readouterr().out


def test_folders_tell_what_they_leave_out(tmp_path: Path, capsys: pytest.CaptureFixture) -> None:
    folder = tmp_path / "pictures" / "cats"
    folder.mkdir(parents=True)
    (folder / "a.jpg").write_bytes(JPEG)
    (folder / "a.txt").write_text("a cat")
    for name in ("b.heic", "c.HEIC"):
        (folder / name).write_bytes(HEIC)
    told = "2 images left out, of formats that are not read"
    open_data(options(f"folder://{folder}", tmp_path, captions="none"))
    assert told in capsys.readouterr().err
    tools.make(str(folder), tmp_path / "pairs")
    assert "of formats that are not read: 2" in capsys.readouterr().err
    tools.make(str(folder.parent), tmp_path / "classes", layout="folders")
    assert told in capsys.readouterr().err
    (folder / "a.jpg").unlink()
    with pytest.raises(ValueError, match=r"no image below .*b\.heic is HEIC, which is not read"):
        open_data(options(f"folder://{folder}", tmp_path, captions="none"))
    (tmp_path / "list.json").write_text(json.dumps([{"image": "b.heic", "caption": "a cat"}]))
    with pytest.raises(ValueError, match=r"b\.heic is HEIC"):
        tools.make(str(tmp_path / "list.json"), tmp_path / "listed", images=str(folder))


def test_a_picture_is_of_the_format_it_holds_not_of_its_name(tmp_path: Path, capsys: pytest.CaptureFixture) -> None:
    kinds = ["PNG", "WEBP", "GIF", "BMP", "TIFF", "JPEG2000", "PPM", "ICO", *["AVIF"] * features.check("avif")]
    entries = {}
    for number, kind in enumerate(kinds):
        out = io.BytesIO()
        photo(64, 64).save(out, kind)
        entries[f"{number}.jpg"] = out.getvalue()
    assert checked(tmp_path, entries, capsys)["good"] == len(kinds)
