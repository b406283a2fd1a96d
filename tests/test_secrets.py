"""Passwords and signatures in URLs are used and neither kept nor printed."""

import json

import fsspec
import pytest
from running import metrics

from jaxvl import config as configs, train
from jaxvl.secrets import public, public_tree
from jaxvl.sweep import run as sweeps
from jaxvl.sweep.options import SweepError
from jaxvl.tiny import shrink

QUICK = "configs/clip_quickstart.py"


@pytest.mark.parametrize("text, shown", [
    ("https://me:pass@host/a.tar", "https://host/a.tar"),
    ("https://token@host:81/{0..9}.tar?v=2", "https://host:81/{0..9}.tar?v=2"),
    ("https://b.s3.amazonaws.com/a.tar?X-Amz-Credential=AK%2F1&X-Amz-Signature=5ec&versionId=7", "https://b.s3.amazonaws.com/a.tar?versionId=7"),
    ("https://storage.googleapis.com/b/a.tar?GoogleAccessId=x&Expires=9&Signature=y%3D", "https://storage.googleapis.com/b/a.tar"),
    ("https://a.blob.core.windows.net/c/a.tar?sv=2022-11-02&ss=b&srt=co&sp=r&se=2030&st=2020&spr=https&sig=5ec", "https://a.blob.core.windows.net/c/a.tar"),
    ("https://hub/a.tar?access_token=hf_x&download=true", "https://hub/a.tar?download=true"),
    ("simplecache::https://u:p@h/a.tar and s3://key:secret@bucket/b.tar", "simplecache::https://h/a.tar and s3://bucket/b.tar"),
    ("glyphs://train?size=60&seed=3", "glyphs://train?size=60&seed=3"),
    ("s3://bucket/mail@host/a.tar", "s3://bucket/mail@host/a.tar"),
    ("/local/a@b.tar?sig=1", "/local/a@b.tar?sig=1"),
    ("s3://AKIA1:wJal/K7+x@bucket/a.tar", "s3://bucket/a.tar"),
    ("http://host:8080/mail@host/a.tar", "http://host:8080/mail@host/a.tar"),
    ("https://host/a.tar?rlkey=3&v=2", "https://host/a.tar?v=2"),
    ("https://host/a.tar#access_token=x&page=2", "https://host/a.tar#page=2"),
    ("https://host/a.tar?v=2#token=x", "https://host/a.tar?v=2"),
    ("s3://bucket/a#1.tar?v=2", "s3://bucket/a#1.tar?v=2"),
])  # fmt: skip
def test_urls_as_they_may_be_shown(text, shown):
    assert public(text) == shown
    assert public_tree({"source": (text, 3), "n": None}) == {"source": (shown, 3), "n": None}


@pytest.mark.parametrize(
    "text", ['a "https://host/a?v=1&token=x"', 'https://host/?token=x"y', "https://host/?token=x\\", "https://host/?token=\n"]
)
def test_printed_json_stays_json(text):
    """A quote, a backslash or a line feed behind a signature is part of the text, not of JSON."""
    shown, one = json.loads(public(json.dumps([text, 1])))
    assert one == 1 and "host/" in shown and "token" not in shown


SECRET = "s3cr3t"


def test_a_run_keeps_none(tmp_path, capfd):
    """config.json, checkpoint, report, log and terminal; the shards are read all the same, and the run goes on."""
    memory = fsspec.filesystem("memory")
    shards = configs.read(shrink(configs.load(QUICK))).data.source
    from jaxvl.data.cache import Cache, cache_folder
    from jaxvl.data.sources import expand

    local = expand(shards, Cache(str(cache_folder()), 2**30))[0]
    name = f"/set/a.tar?X-Amz-Signature={SECRET}"
    with open(local, "rb") as file:
        memory.pipe(name, file.read())
    try:
        config = configs.override(
            shrink(configs.load(QUICK), steps=1), [f"data.source=memory://{name}", f"data.cache={tmp_path / 'cache'}"]
        )
        for steps in (1, 2):
            assert train.train(configs.override(config, [f"train.steps={steps}"]), tmp_path / "run") == 0
        assert metrics(tmp_path / "run")[-1]["step"] == 2
    finally:
        memory.rm("/set", recursive=True)
    told = capfd.readouterr()
    assert SECRET not in told.out + told.err and "are not kept" in told.err
    assert "config.data.source was" not in told.err
    assert [str(p) for p in (tmp_path / "run").rglob("*") if p.is_file() and SECRET.encode() in p.read_bytes()] == []


def test_a_sweep_whose_trials_would_keep_one_is_refused(tmp_path):
    file = tmp_path / "sweep.py"
    file.write_text(
        f"def sweep():\n    return dict(metric='val/rsum', rows={{'a': {{'config': '{configs.Path(QUICK).resolve()}', 'data.source': 'https://u:{SECRET}@h/a.tar'}}}}, seeds=(0,))\n"
    )
    with pytest.raises(SweepError, match="has a password or a signature"):
        sweeps.run(str(file), tmp_path / "sweep", [], tiny=False)
    assert SECRET not in "".join(p.read_text() for p in (tmp_path / "sweep").rglob("*.json"))
