"""A folder or files that a command makes are whole, or there is nothing: not even the folders above, and nothing else is touched."""

import pytest

from jaxvl.new_files import new_files, new_folder


def names(folder):
    return sorted(p.relative_to(folder).as_posix() for p in folder.rglob("*"))


@pytest.mark.parametrize("error", [ValueError, KeyboardInterrupt, SystemExit])
def test_what_breaks_leaves_nothing(tmp_path, error):
    (tmp_path / "b.partial").mkdir()
    (tmp_path / "b.partial" / "mine").touch()
    before = names(tmp_path)
    for out in (tmp_path / "a" / "deep" / "er", tmp_path / "b"):
        with pytest.raises(error), new_folder(out) as partial:
            (partial / "x").touch()
            raise error
        with pytest.raises(error), new_files(out, [out / "0.tar", out / "1.tar"]):
            (out / "0.tar").touch()
            raise error
    assert names(tmp_path) == before


def test_what_is_whole_stays(tmp_path):
    with new_folder(tmp_path / "a" / "b") as partial:
        (partial / "x").touch()
        partial.rename(tmp_path / "a" / "b")
    with new_files(tmp_path / "c" / "d", []):
        (tmp_path / "c" / "d" / "y").touch()
    assert names(tmp_path) == ["a", "a/b", "a/b/x", "c", "c/d", "c/d/y"]


def test_a_place_that_is_taken_is_left_alone(tmp_path):
    (tmp_path / "file").write_text("mine")
    (tmp_path / "link").symlink_to("nowhere")
    for name in ("file", "link"):
        with pytest.raises(FileExistsError, match=f"{name} exists; choose another --index"), new_folder(tmp_path / name, "--index"):
            pass
    (tmp_path / "there").mkdir()
    (tmp_path / "there" / "old").touch()
    with pytest.raises(OSError), new_files(tmp_path / "there", [tmp_path / "there" / "new", tmp_path / "there" / "old"]):
        raise OSError
    assert names(tmp_path) == ["file", "link", "there", "there/old"]
