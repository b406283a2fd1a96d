"""Lists of captions that people write: what is refused and where, what is read all the same, and what is told of the rest."""

import json
import os
import unicodedata
from pathlib import Path

import pytest
from shards import options, picture

from jaxvl import cli
from jaxvl.data.composed_sets import make_set
from jaxvl.data.dataset import open_data, read_samples
from jaxvl.data.layouts import make_classes
from jaxvl.data.lists import read_json, rows, text_lines
from jaxvl.data.make import make_annotated, make_shards

E = "caf\u00e9"


@pytest.fixture
def folder(tmp_path):
    root = tmp_path / "pictures"
    (root / "deep").mkdir(parents=True)
    for i, name in enumerate(("0.png", "1.PNG", "deep/2.png", f"{E}.png", unicodedata.normalize("NFD", "na\u00efve.png"))):
        (root / name).write_bytes(picture(i))
    return root


def captions(folder, out):
    """The captions of every image in the shards made of `folder`."""
    make_shards(folder, out, 3)
    dataset = open_data(options(str(out), out.parent, captions="random"))
    return {r.meta["file"]: list(r.captions) for r in read_samples(dataset, range(len(dataset)))}


@pytest.mark.parametrize(
    ("name", "content", "told"),
    [
        ("metadata.csv", 'image,text\n0.png,"a red\n1.PNG,a blue\n', ":2 is no row of a table .*quote"),
        ("metadata.csv", 'image,text\n0.png,"a 5" pipe"\n', ":2 is no row"),
        ("metadata.csv", 'image,text\n0.png,fine\n1.PNG,"a red\ndeep/2.png,the door"\n', ":3 runs over lines that are rows"),
        ("captions.txt", 'text,image\n"a red,1.PNG\nthe door",0.png\n', ":2 runs over lines that are rows"),
        ("metadata.csv", "image,text\n0.png,a, b\n", ":2 has 3 columns, not the 2 of image, text"),
        ("captions.csv", "image,text\n\n0.png\n", ":3 has 1 columns"),
        ("captions.tsv", "image\ttext\n0.png\ta\tb\n", ":2 has 3 columns.* tab"),
        ("captions.csv", "image,text\n0.png," + "w" * 140_000, ":2 .*field larger than"),
        ("captions.csv", "image,text,text\n0.png,a,b", ":1 names the column 'text' twice"),
        ("captions.csv", "path,words\n0.png,a", ":2 has path, words; it needs one of file_name"),
        ("captions.csv", "image,text\n ,a", ":2 has a blank for the path"),
        ("captions.csv", f"image,text\n0.png,a\n1.PNG,{E}".encode("latin-1"), ":3 is not UTF-8 .byte 0xe9 in column 10"),
        ("captions.csv", "image,text\n0.png,a".encode("utf-16-le"), ":1 holds a NUL"),
        ("captions.csv", "image,text\n0.png,a".encode("utf-16")[:-1], ":1 is not utf-16"),
        ("metadata.jsonl", '{"image": "0.png", "text": "a"}\n\n{"image": "1.PN', ":3 is no JSON .Unterminated"),
        ("metadata.jsonl", '["0.png", "a"]', ":1 holds a list; it must be an object"),
        ("metadata.jsonl", '{"image": "0.png", "text": "a", "text": "b"}', ":1 is no JSON .*names 'text' twice"),
        ("metadata.jsonl", '{"image": 3, "text": "a"}', ":1 has a number for the path"),
        ("metadata.jsonl", "[" * 100_000, ":1 is no JSON"),
        ("metadata.jsonl", '{"image": ' + "1" * 5000 + "}", ":1 is no JSON"),
    ],
)
def test_a_damaged_list_is_refused_with_file_and_line_and_nothing_is_written(folder, tmp_path, name, content, told, capsys):
    (folder / name).write_bytes(content if isinstance(content, bytes) else content.encode())
    with pytest.raises(ValueError, match=name + told):
        make_shards(folder, tmp_path / "out", 3)
    assert cli.main(["data", "make", str(folder), f"--out={tmp_path / 'out'}"]) == 2
    assert not (tmp_path / "out").exists()
    (folder / name).rename(tmp_path / name)  # the same list, given by itself
    if not name.endswith(".txt"):
        assert cli.main(["data", "make", str(tmp_path / name), f"--images={folder}", f"--out={tmp_path / 'out'}"]) == 2
        assert not (tmp_path / "out").exists()


@pytest.mark.parametrize("encoding", ["utf-8", "utf-8-sig", "utf-16", "utf-16-be", "utf-32"])
@pytest.mark.parametrize("end", ["\n", "\r\n", "\r"])
def test_encodings_and_line_ends(tmp_path, encoding, end):
    mark = "\ufeff" if encoding == "utf-16-be" else ""
    table = tmp_path / "x.csv"
    lines = ["image,text", f'0.png,"{E}\u2028""so"", two', 'lines"', '1.png,a 5" pipe', ""]
    table.write_bytes((mark + end.join(lines)).encode(encoding))
    assert [(r.where, r.fields) for r in rows(table)] == [
        (f"{table}:2", {"image": "0.png", "text": f'{E}\u2028"so", two{end}lines'}),
        (f"{table}:4", {"image": "1.png", "text": 'a 5" pipe'}),
    ]
    (tmp_path / "x.txt").write_bytes((mark + end.join([" a", " ", f"{E}\u2028b"])).encode(encoding))
    assert list(text_lines(tmp_path / "x.txt")) == [(1, " a"), (3, f"{E}\u2028b")]


def test_paths_are_matched_as_paths_and_the_others_told(folder, tmp_path, capsys):
    nfd = unicodedata.normalize("NFD", "na\u00efve.png")
    named = [
        "./0.png",
        "deep/..\\1.PNG",
        str(folder / "deep" / "2.png"),
        unicodedata.normalize("NFD", f"{E}.png"),
        "na\u00efve.png",
        "0.PNG",
        "../x.png",
    ]
    (folder / "metadata.jsonl").write_text("".join(json.dumps({"file": name, "text": f"t{i}"}) + "\n" for i, name in enumerate(named)))
    want = {"0.png": ["t0"], "1.PNG": ["t1"], "deep/2.png": ["t2"], f"{E}.png": ["t3"], nfd: ["t4"]}
    assert captions(folder, tmp_path / "out") == want
    told = capsys.readouterr().err
    assert "lines of 7 that name no image" in told and "metadata.jsonl:6 names 0.PNG; " in told and "jsonl:7 names ../x.png" in told
    (tmp_path / "link").symlink_to(folder)
    assert captions(tmp_path / "link", tmp_path / "again") == want
    relative = os.path.relpath(folder)
    (folder / "metadata.jsonl").write_text(json.dumps({"file": "gone.png", "text": "x"}))
    with pytest.raises(ValueError, match=r"5 images, .*no line of .*metadata.jsonl names one of them, for one .*:1 names gone.png"):
        make_shards(folder.parent / ".." / folder.parent.name / relative.rpartition("/")[2], tmp_path / "no", 3)


def test_captions_that_are_no_text_are_left_out_and_told(folder, tmp_path, capsys):
    lines = [("0.png", "one"), ("1.PNG", None), ("deep/2.png", ["a", None, {"b": 1}, "c", 7]), (f"{E}.png", " \ufeff"), ("0.png", "\ud800")]
    more = {"comment": "kept", "entries": [1], "half": "\ud800"}
    (folder / "metadata.jsonl").write_text("\n".join(json.dumps({"image": name, "caption": text} | more) for name, text in lines))
    assert captions(folder, tmp_path / "out") == {"0.png": ["one"], "deep/2.png": ["a", "c"]}
    sample = next(iter(read_samples(open_data(options(str(tmp_path / "out"), tmp_path)), [0])))
    assert sample.meta == {"file": "0.png", "captions": ["one"]} | more
    told = capsys.readouterr().err
    assert "captions left out: 6 (" in told and ":2 has null for a caption" in told and ":3 has an object" in told
    (folder / "metadata.jsonl").rename(tmp_path / "list.jsonl")
    assert cli.main(["data", "make", str(tmp_path / "list.jsonl"), f"--images={folder}", f"--out={tmp_path / 'by list'}"]) == 0
    told = capsys.readouterr()
    assert "captions left out: 6 (" in told.err and "2 images left out" in told.out


def test_sidecars_as_in_a_tar(tmp_path, capsys):
    for i, ending in enumerate(("TXT", "text", "Caption", "txt", "txt")):
        (tmp_path / f"{i}.JPG").write_bytes(picture(i))
        (tmp_path / f"{i}.{ending}").write_bytes((f"\ufeff{E} {i}" if i < 4 else E).encode("utf-8" if i < 4 else "latin-1"))
    (tmp_path / "0.Json").write_text('{"year": 1}')
    (tmp_path / "3.caption").write_text("another")
    assert captions(tmp_path, tmp_path / "out") == {f"{i}.JPG": [f"{E} {i}"] for i in range(4)}
    told = capsys.readouterr().err
    assert "3.caption stands beside another" in told and "4.txt is undecodable" in told
    (tmp_path / "0.Json").write_text('{"year": ')
    with pytest.raises(ValueError, match="0.Json:1 is no JSON"):
        make_shards(tmp_path, tmp_path / "again", 1)
    assert not (tmp_path / "again").exists(), "of what cannot be read whole nothing is left"


def test_cocos_own_file(folder, tmp_path):
    images = [{"id": 7, "file_name": "0.png"}, {"id": 8, "file_name": "1.PNG"}, {"id": 9, "file_name": "deep/2.png"}]
    notes = [{"image_id": 8, "caption": "a", "id": 1}, {"image_id": 7, "caption": "b", "id": 2}, {"image_id": 8, "caption": "c", "id": 3}]
    file = tmp_path / "captions_val2017.json"
    file.write_text(json.dumps({"info": {}, "images": images, "annotations": notes}))
    assert cli.main(["data", "make", str(file), f"--images={folder}", f"--out={tmp_path / 'out'}"]) == 0
    dataset = open_data(options(str(tmp_path / "out"), tmp_path, captions="random", id="image_id"))
    assert {r.meta["image_id"]: r.captions for r in read_samples(dataset, range(2))} == {7: ("b",), 8: ("a", "c")}
    for changed, told in (
        ({"annotations": [{"image_id": 6, "caption": "x"}]}, "annotations, entry 1 is of image 6, which"),
        ({"annotations": [{"image_id": 7, "bbox": []}]}, "has no caption but image_id, bbox; of COCO's files, those called captions_"),
        ({"images": images[:1] * 2}, "images, entry 2 has the id 7, which another image has"),
        ({"images": {"7": "0.png"}}, "images holds an object; it must be a list"),
        ({"images": [{"id": 7, "file_name": "w" * 300}, images[1]]}, "1 of 2 images of .* are not below .*: wwww"),
    ):
        file.write_text(json.dumps({"images": images, "annotations": notes} | changed))
        with pytest.raises(ValueError, match=told):
            make_annotated(file, folder, tmp_path / "no", 3)
    for content, told in (
        ('{"questions": []}', "it holds an object of questions, and neither"),
        ('[{"id": 1}]', "entry 1 has id; it needs one of file_name"),
    ):
        file.write_text(content)
        with pytest.raises(ValueError, match=told):
            make_annotated(file, folder, tmp_path / "no", 3)


def test_lists_of_layouts(folder, tmp_path):
    (folder / "Ebay_train.txt").write_bytes("image_id class_id super_class_id path\r\n1 3 1 .\\deep\\2.png\r\n".encode("utf-16"))
    shards, missing = make_classes("sop", folder, tmp_path / "out", "train", 3)
    assert len(shards) == 1 and not missing
    (folder / "Ebay_train.txt").write_bytes(f"1 2 3 0.png\n1 2 3 {E}.png".encode("latin-1"))
    with pytest.raises(ValueError, match="Ebay_train.txt:2 is not UTF-8"):
        make_classes("sop", folder, tmp_path / "no", "train", 3)
    assert not (tmp_path / "no").exists()


@pytest.mark.parametrize(
    ("what", "file", "content", "told"),
    [
        ("fashion200k", "labels/a_train_detect_all.txt", b"a.jpg\t0.9\t\nb.jpg\t0.9\n", ":2: .* is not an image, a score and a caption"),
        ("fashion200k", "labels/a_train_detect_all.txt", "a.jpg\t1\tcaf\u00e9".encode("latin-1"), ":1 is not UTF-8"),
        ("fashioniq", "image_splits/split.dress.train.json", b'["a",\n"b', ":2 is no JSON"),
        ("utzap50k", "ut-zap50k-data/meta-data.csv", b'CID,Category\n1-2,"Boots\n', ":2 is no row"),
        ("utzap50k", "ut-zap50k-data/meta-data.csv", b"CID,Category\n1-2\n", ":2 has 1 columns"),
        ("utzap50k", "ut-zap50k-data/meta-data.csv", b"id,Category\n1-2,x\n", "is not as the set is published .KeyError: 'CID'"),
    ],
)
def test_lists_of_composed_sets(tmp_path, what, file, content, told):
    (tmp_path / "raw" / file).parent.mkdir(parents=True)
    (tmp_path / "raw" / file).write_bytes(content)
    with pytest.raises(ValueError, match=told):
        make_set(what, tmp_path / "raw", tmp_path / "out", "train", 3)
    assert not (tmp_path / "out").exists()


def test_a_composed_set_is_written_whole_or_not_at_all(tmp_path, monkeypatch):
    raw = tmp_path / "raw"
    (raw / "labels").mkdir(parents=True)
    (raw / "labels" / "a_train_detect_all.txt").write_text("a.jpg\t1\tred\nb.jpg\t1\tblue\n")
    for name in ("a.jpg", "b.jpg"):
        (raw / name).write_bytes(b"x")
    for count in (0, -1):
        with pytest.raises(ValueError, match="at least 1"):
            make_set("fashion200k", raw, tmp_path / "deep" / "out", "train", count)
    read = Path.read_bytes

    def torn(path):
        if path.name == "b.jpg":
            raise OSError("the disk has gone")
        return read(path)

    with monkeypatch.context() as patch:
        patch.setattr(Path, "read_bytes", torn)
        with pytest.raises(OSError, match="gone"):
            make_set("fashion200k", raw, tmp_path / "deep" / "out", "train", 1)
    assert not (tmp_path / "deep").exists()
    assert len(make_set("fashion200k", raw, tmp_path / "deep" / "out", "train", 1)[0]) == 2


@pytest.mark.parametrize("name", ["x.csv", "x.json", "x.jsonl", "x.txt"])
def test_what_is_no_regular_file_is_not_waited_for(tmp_path, name):
    """A pipe that nobody writes to, and a folder."""
    os.mkfifo(tmp_path / name)
    (tmp_path / "folder").mkdir()
    for path in (tmp_path / name, tmp_path / "folder"):
        for read in (rows, text_lines, lambda path: [read_json(path)]):
            with pytest.raises(OSError, match=f"no regular file: '{path}'"):
                list(read(path))
