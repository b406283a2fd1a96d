"""What the code of a config file raises is one sentence with its file and line; so is a config that is of no use as one."""

import pytest

from jaxvl import config as configs, config_file
from jaxvl.config import ConfigError
from jaxvl.sweep import plan

CODE = "def get_config(arg='x'):\n    {}\n"
HEAD = "method=dict(name='clip', width=8)"


@pytest.mark.parametrize("text, line, words", [
    ("def get_config(:\n", "line 1", "no Python (invalid syntax)"),
    ("x = 1\0\n", "x.py", "null bytes"),
    ("\n1 / 0\n", "line 2", "ZeroDivisionError: division by zero"),
    ("import sys\nsys.exit(0)\n", "line 2", "sys.exit"),
    ("import nosuchpackage\n", "line 1", "the package nosuchpackage is not installed"),
    ("import jaxvl.nosuch\n", "line 1", "No module named 'jaxvl.nosuch'"),
    (CODE.format("return {}['gone']"), "line 2", "KeyError: 'gone'"),
    (CODE.format("raise SystemExit('no')"), "line 2", "sys.exit"),
    (CODE.format("raise ValueError('of its own')"), "line 2", "of its own"),
    (CODE.format("from ml_collections import ConfigDict; c = ConfigDict({'a': 1}); c.a = 'b'"), "line 2", "TypeError"),
    ("get_config = 5\n", "x.py", "TypeError"),
    ("def get_config():\n    return {}\n", "x.py", "TypeError"),  # with an argument
])  # fmt: skip
def test_what_a_config_file_raises_is_told_with_its_line(tmp_path, text, line, words):
    file = tmp_path / "x.py"
    file.write_text(text)
    with pytest.raises(ConfigError) as error:
        configs.load(f"{file}:argument")
    assert str(file) in str(error.value) and line in str(error.value) and words in str(error.value), error.value


def test_the_line_is_that_of_the_config_which_another_varies(tmp_path):
    (tmp_path / "below_it.py").write_text("\n\nraise KeyError('deep')\n")
    (tmp_path / "x.py").write_text("import below_it\n")
    with pytest.raises(ConfigError, match=r"below_it.py, line 3: KeyError: 'deep'"):
        config_file.run(str(tmp_path / "x.py"))


def test_a_sweep_is_code_as_well(tmp_path):
    (tmp_path / "x.py").write_text("def sweep():\n    return dict(metric=missing)\n")
    with pytest.raises(ConfigError, match="x.py, line 2: NameError"):
        plan.load(str(tmp_path / "x.py"))


@pytest.mark.parametrize("content, words", [
    ("None", "None, a NoneType; get_config() must return a ConfigDict"),
    ("[1]", "a list"),
    (f"dict({HEAD}, evals=dict(val=3))", "config.evals.val is 3; it must be a section"),
    (f"dict({HEAD}, evals=dict(val=None))", "config.evals.val is None"),
    (f"dict({HEAD}, evals=dict(val=dict(kind=['retrieval'])))", "config.evals.val.kind is ['retrieval']"),
    ("dict(method=dict(name=['clip']))", "config.method.name is ['clip']"),
    (f"dict({HEAD}, image=dict(kind=['vit']))", "config.image.kind is ['vit']"),
    (f"dict({HEAD}, image=3)", "config.image is 3"),
])  # fmt: skip
def test_what_is_no_config_is_refused_by_its_key(tmp_path, content, words):
    (tmp_path / "x.py").write_text(CODE.format(f"return {content}"))
    with pytest.raises(ConfigError) as error:
        configs.load(str(tmp_path / "x.py"))
    assert words in str(error.value)
