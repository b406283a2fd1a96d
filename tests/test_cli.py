"""One boundary: what a user can cause is one sentence and exit 2, a lost peer is exit 1, a fault of the program shows its traceback."""

import csv
import json
import lzma
import re
import struct
import subprocess
import sys
import zlib
from pathlib import Path

import pytest

from jaxvl import cli, config as configs, facts
from jaxvl.data.text import TokenizerOptions, load_tokenizer
from jaxvl.plan import outside
from jaxvl.search import extras
from jaxvl.sweep.folder import read_options, read_record


def raised(monkeypatch, capsys, error):
    def fail(*_):
        raise error

    monkeypatch.setitem(cli.RUN, "report", fail)
    return cli.main(["report", "x"]), capsys.readouterr().err


def of(module, name, text):
    """An exception as the package `module` would raise it."""
    return type(name, (Exception,), {"__module__": module})(text)


MISSING = ModuleNotFoundError("No module named 'gcsfs'", name="gcsfs")


@pytest.mark.parametrize("error, words", [
    (ValueError("x.csv:3 is wrong"), "x.csv:3 is wrong"),
    (ValueError(), "ValueError"),
    (FileNotFoundError(2, "No such file", "a.tar"), "a.tar"),
    (MISSING, "the package gcsfs is not installed: pip install gcsfs"),
    (ModuleNotFoundError("No module named 'faiss'", name="faiss.swigfaiss"), "pip install faiss-cpu"),
    (ImportError("Install s3fs to access S3"), "Install s3fs to access S3"),
    (MemoryError("Unable to allocate 14.2 TiB"), "too little memory (Unable to allocate 14.2 TiB)"),
    (OverflowError("int too large to convert to float"), "too large"),
    (csv.Error("field larger than field limit (131072)"), "field larger"),
    (RecursionError("maximum recursion depth exceeded"), "nested too deeply"),
    (EOFError("Compressed file ended before the end-of-stream marker"), "ends too early"),
    (zlib.error("Error -3 while decompressing"), "Error -3"),
    (lzma.LZMAError("Input format not supported"), "not supported"),
    (struct.error("unpack requires a buffer of 4 bytes"), "buffer of 4 bytes"),
    (of("botocore.exceptions", "NoCredentialsError", "Unable to locate credentials"), "Unable to locate credentials"),
    (of("google.auth.exceptions", "DefaultCredentialsError", "Your default credentials were not found"), "credentials"),
    (of("wandb.errors", "CommError", "api_key not configured"), "api_key not configured"),
    (of("safetensors_rust", "SafetensorError", "invalid header"), "invalid header"),
    (RuntimeError("RESOURCE_EXHAUSTED: Out of memory allocating 99 bytes.\nBacktrace"), "lower train.batch_size"),
    (RuntimeError("Unable to initialize backend 'cuda': no device"), "JAX cannot use the device that was asked for"),
], ids=lambda x: type(x).__name__ if isinstance(x, Exception) else "")  # fmt: skip
def test_what_a_user_can_cause_is_one_sentence(monkeypatch, capsys, error, words):
    status, told = raised(monkeypatch, capsys, error)
    assert status == 2 and words in told and "Traceback" not in told
    assert told.startswith("jaxvl report: ") and told.strip().count("\n") == 1, told  # and how to see where


@pytest.mark.parametrize(
    "error", [KeyError("x"), TypeError("x"), AssertionError(), RuntimeError("x"), ModuleNotFoundError("x", name="jaxvl.gone")]
)
def test_a_fault_of_the_program_shows_where(monkeypatch, capsys, error):
    status, told = raised(monkeypatch, capsys, error)
    assert status == 1 and "Traceback" in told


def test_a_platform_that_is_not_installed_is_named(monkeypatch, capsys):
    """With JAX_PLATFORMS=cuda and no plugin for CUDA, JAX has nothing but a failed assertion."""
    monkeypatch.setenv("JAX_PLATFORMS", "cuda")
    monkeypatch.setitem(cli.RUN, "report", lambda *_: exec(compile("assert False", "/x/jax/_src/xla_bridge.py", "exec")))
    assert cli.main(["report", "x"]) == 2
    said = capsys.readouterr().err
    assert "JAX_PLATFORMS is 'cuda', and there is none" in said and "Traceback" not in said


def test_lost_peers_and_signals_have_a_status_of_their_own(monkeypatch, capsys):
    """Launchers start a run again for some, and not for others."""
    assert raised(monkeypatch, capsys, ValueError("UNAVAILABLE: connection reset by peer"))[0] == 1
    assert raised(monkeypatch, capsys, KeyboardInterrupt()) == (130, "jaxvl report: interrupted\n")


@pytest.mark.parametrize("words, told", [
    ("search query INDEX --text a --k 0", "--k: '0' is no whole number from 1 on"),
    ("search query INDEX --text a --k 1e3", "--k: '1e3' is no whole number"),
    ("search index RUN SOURCE --index NEW --batch-size -3", "--batch-size"),
    ("search index RUN SOURCE --index NEW --threshold nan", "--threshold: 'nan' is no number from 0 on"),
    ("search index RUN SOURCE --index NEW --threshold 1e400", "--threshold"),
    ("search index RUN SOURCE --index NEW --active -1", "--active"),
    ("search export INDEX --format anserini --out NEW --scale 0", "--scale"),
    ("words RUN --images 0", "--images"),
    ("sweep --config x.py --workdir W --workers -1", "--workers"),
    ("plan --config x.py --topology cpu:8 --limit nan", "--limit"),
    ("plan --config x.py --topology cpu:8 --compiles 0", "--compiles"),
    ("bench loss --rounds -1", "--rounds"),
    ("data make glyphs --out NEW --size 0", "--size"),
    ("data make glyphs --out NEW --per-shard " + "9" * 5000, "--per-shard"),
    ("train --config x.py --workdir=", "--workdir: it is empty"),
    ("export RUN --format hf --out=", "--out: it is empty"),
])  # fmt: skip
def test_numbers_and_places_that_cannot_be_meant_are_refused_by_their_flag(capsys, words, told):
    with pytest.raises(SystemExit) as left:
        cli.main(words.split())
    assert left.value.code == 2 and told in capsys.readouterr().err


@pytest.mark.parametrize("words, told", [
    ("sweep --report DIR --workdir W", "--report does not read --workdir"),
    ("sweep --report DIR --config.seed=3", "--report does not read --config.seed=3"),
    ("plan --table DIR --json", "--table does not read --json"),
    ("plan --table DIR --config x.py", "--table does not read --config"),
])  # fmt: skip
def test_what_a_flag_does_not_read_is_not_ignored(capsys, words, told):
    assert cli.main(words.split()) == 2 and told in capsys.readouterr().err


def test_a_reader_that_leaves_is_no_error(tmp_path):
    """`jaxvl ... | head`: quiet, with the status that a shell gives a broken pipe."""
    code = "from jaxvl import cli; cli.RUN['report'] = lambda *_: [print('x' * 99, flush=True) for _ in range(10**5)] and 0; raise SystemExit(cli.main(['report', 'x']))"
    with subprocess.Popen([sys.executable, "-c", code], stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True) as run:
        run.stdout.readline()
        run.stdout.close()
        assert (run.stderr.read(), run.wait()) == ("", 141)


@pytest.mark.parametrize("damage", [b"{", b"", b"\xff\xfe{", b"[" * 50_000, b"null", b"[1]", b'{"a": 1}'], ids=repr)
def test_a_damaged_file_of_a_run_is_named(tmp_path, damage, capsys):
    """config.json, classes.json, tokenizer.json and its config, sweep.json and trial.json: whatever is in them."""
    run = tmp_path / "run"
    (run / "trial").mkdir(parents=True)
    for name in ("config.json", "classes.json", "tokenizer.json", "tokenizer_config.json", "sweep.json", "trial/trial.json"):
        (run / name).write_bytes(damage)
    opened = {
        "config.json": lambda: configs.read(configs.load(str(run / "config.json"))),
        "classes.json": lambda: facts.of_run(None, run, None),
        "tokenizer": lambda: load_tokenizer(TokenizerOptions(), run),
        "sweep.json": lambda: read_options(run),
        "trial.json": lambda: read_record(run, "trial"),
    }
    for name, open_it in opened.items():
        if name == "tokenizer" and damage.startswith(b"{"):
            (run / "tokenizer_config.json").write_text(json.dumps({"eos_token": "<eos>"}))
        with pytest.raises((ValueError, OSError, RecursionError)) as error:
            open_it()
        assert re.search(name if damage not in (b"null", b"[1]", b'{"a": 1}') else ".", str(error.value)), (name, str(error.value))


def test_advice_names_what_can_be_installed(monkeypatch):
    """jaxvl is in no index of packages, so that `pip install 'jaxvl[x]'` would help nobody."""
    monkeypatch.setitem(extras.LIBRARIES, "faiss", ("faiss-cpu", "no_such_module"))
    with pytest.raises(ValueError, match="pip install faiss-cpu"):
        extras.library("faiss")
    assert "pip install libtpu" in outside.ABSENT
    text = "".join(p.read_text() for p in (Path(cli.__file__).parent).rglob("*.py"))
    assert not re.search(r"pip install '?jaxvl", text)


def test_a_run_begins_with_the_command_and_not_with_the_script_that_installed_it(tmp_path):
    """launch/quickstart installs, then becomes this command: of that time goodput must know nothing."""
    code = "import sys; from jaxvl import cli, train; train.train = lambda *_, age: print(age) or 0; sys.exit(cli.main(sys.argv[1:]))"
    config = Path(__file__).parent.parent / "configs" / "clip_quickstart.py"
    script = f'sleep 3; exec "$0" -c "$1" train --config={config} --workdir={tmp_path}'
    age = float(subprocess.run(["bash", "-c", script, sys.executable, code], capture_output=True, text=True, check=True).stdout)
    begun = float(subprocess.run([sys.executable, "-c", "import time; t = time.perf_counter(); import jaxvl.train; print(time.perf_counter() - t)"],
                                 capture_output=True, text=True, check=True).stdout)  # fmt: skip
    assert 0.1 < age < begun + 3
