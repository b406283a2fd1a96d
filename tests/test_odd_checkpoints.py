"""What is no whole step of a run is never loaded, and is told: by name, in one sentence, without waiting."""

import shutil

import odd_checkpoints as odd
import pytest

from jaxvl import manifest
from jaxvl.manifest import DamagedError
from jaxvl.restore import restore


@pytest.fixture(scope="module")
def base(tmp_path_factory):
    folder = tmp_path_factory.mktemp("base") / "checkpoints"
    odd.save(folder)
    return folder


@pytest.fixture
def folder(base, tmp_path):
    return shutil.copytree(base, tmp_path / "checkpoints", symlinks=True)


def test_the_folder_is_whole_to_begin_with(folder):
    found = restore(folder, odd.abstract())
    assert found.step == 48 and odd.same(found.state, 48)


@pytest.mark.parametrize("name", odd.ODD)
def test_an_odd_step_is_refused_and_the_one_before_it_is_used(name, folder):
    odd.ODD[name](folder / "00000048")
    with pytest.raises(DamagedError, match="step 48") as error:
        restore(folder, odd.abstract(), 48)
    assert "\n" not in str(error.value)
    found = restore(folder, odd.abstract())
    assert found.step == 44 and odd.same(found.state, 44)


@pytest.mark.parametrize("name", odd.NO_STEPS)
def test_a_folder_whose_name_no_step_has_is_no_step(name, folder):
    (folder / name).mkdir()
    assert manifest.whole_steps(folder) == [48, 44, 40]
    assert restore(folder, odd.abstract()).step == 48


def test_hidden_files_are_nobodys(folder):
    (folder / "00000048" / "state" / ".nfs0001").write_text("x")
    assert restore(folder, odd.abstract()).step == 48
