"""The files that decide what a run computes are its own, or it is not opened."""

import json
import os
import shutil

import pytest
from running import RECIPE, references, said, start  # noqa: F401, references is a fixture

from jaxvl import cli, manifest, seal
from jaxvl.manifest import DamagedError


@pytest.fixture
def run(tmp_path):
    """A run with a tokenizer, its words and its classes, and one checkpoint of no arrays."""
    (tmp_path / "tokenizer").mkdir()
    (tmp_path / "tokenizer" / "tokenizer.json").write_text(json.dumps({"model": {"vocab": {"a": 1, "b": 2}}}))
    (tmp_path / "tokenizer" / "tokenizer_config.json").write_text("{}")
    (tmp_path / "tokenizer" / "lexicon.json").write_text("[1, 2]")
    (tmp_path / "classes.json").write_text('{"classes": ["x", "y"], "parents": [[0, 0]]}')
    target = manifest.step_folder(tmp_path / "checkpoints", 8)
    target.mkdir(parents=True)
    manifest.write(target, 8, {"files": seal.stamp(tmp_path)}, {}, {})
    return tmp_path


FILES = ("tokenizer/tokenizer.json", "tokenizer/tokenizer_config.json", "tokenizer/lexicon.json", "classes.json")


def _flip(path):
    data = bytearray(path.read_bytes())
    data[len(data) // 2] ^= 1
    path.write_bytes(data)


DAMAGE = {
    "flipped": _flip,
    "cut": lambda path: path.write_bytes(path.read_bytes()[:-3]),
    "empty": lambda path: path.write_bytes(b""),
    "missing": lambda path: path.unlink(),
    "a pipe": lambda path: (path.unlink(), os.mkfifo(path)),
    "a folder": lambda path: (path.unlink(), path.mkdir()),
    "a device": lambda path: (path.unlink(), path.symlink_to("/dev/zero")),
}


def test_an_undamaged_run_is_opened(run):
    (run / "tokenizer" / ".nfs01").write_text("of a file system")
    seal.check(run)


@pytest.mark.parametrize("how", DAMAGE)
@pytest.mark.parametrize("name", FILES)
def test_a_damaged_file_is_refused_by_name(run, name, how):
    DAMAGE[how](run / name)
    with pytest.raises(DamagedError, match=name.rpartition("/")[2]):
        seal.check(run)


def test_a_file_that_was_not_there_is_refused(run):
    (run / "tokenizer" / "added.json").write_text("{}")
    with pytest.raises(DamagedError, match="added.json was not there"):
        seal.check(run)


def test_the_hashes_are_those_of_the_newest_manifest_that_can_be_read(run):
    target = manifest.step_folder(run / "checkpoints", 16)
    target.mkdir()
    (target / manifest.FILE).write_text("damaged")
    seal.check(run)
    _flip(run / FILES[0])
    with pytest.raises(DamagedError, match="checkpoint step 8"):
        seal.check(run)


def test_a_checkpoint_without_hashes_is_told(run, capsys):
    target = manifest.step_folder(run / "checkpoints", 16)
    target.mkdir()
    manifest.write(target, 16, {}, {}, {})
    seal.check(run)
    assert "step 16 has no hashes" in capsys.readouterr().err


def _permute(file):
    """The ids of a tokenizer handed round: legal in every way, and another tokenizer."""
    body = json.loads(file.read_text())
    vocabulary = body["model"]["vocab"]
    words = [word for word, number in vocabulary.items() if number >= 4]
    numbers = [vocabulary[word] for word in words]
    vocabulary |= dict(zip(words, [*numbers[7:], *numbers[:7]], strict=True))
    file.write_text(json.dumps(body))


@pytest.mark.parametrize(
    "damage", [_permute, _flip, lambda file: file.write_bytes(file.read_bytes()[:100])], ids=["permuted", "flipped", "cut"]
)
def test_every_command_that_opens_a_run_refuses_it(references, damage, tmp_path, capsys):  # noqa: F811
    workdir = shutil.copytree(references(RECIPE), tmp_path / "run")
    damage(workdir / "tokenizer" / "tokenizer.json")
    (tmp_path / "texts.txt").write_text("a\n")
    for command in (
        ["eval", f"--workdir={workdir}"],
        ["export", str(workdir), "--format=safetensors", f"--out={tmp_path / 'out'}"],
        ["search", "index", str(workdir), str(tmp_path / "texts.txt"), f"--index={tmp_path / 'index'}"],
    ):
        assert cli.main(command) == 2
        assert "tokenizer.json is not the file that checkpoint step" in capsys.readouterr().err
    if damage is _permute:  # a start of its own is dear
        process = start(workdir, "train.steps=99")
        assert process.wait(120) == 2
        assert "tokenizer.json is not the file that checkpoint step" in said(workdir)
