"""The input bench on a few images: the same shards each time, checked results, every row it promises."""

import io
import json
import tarfile

import numpy as np
import pytest
from PIL import Image

from jaxvl.bench import input as bench, photos


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    folder = tmp_path_factory.mktemp("shards")
    photos.write_shards(folder, 2, 12, sides=(200, 300))
    return folder


def test_shards_are_photograph_like_and_the_same_for_a_seed(folder, tmp_path):
    made = photos.write_shards(tmp_path, 2, 12, sides=(200, 300))
    assert made["samples"] == 24 and 0.17 < made["bytes_per_pixel"] < 0.33
    for shard in ("00000.tar", "00001.tar"):
        assert (tmp_path / shard).read_bytes() == (folder / shard).read_bytes()
    with tarfile.open(folder / "00000.tar") as tar:
        files = {m.name: tar.extractfile(m).read() for m in tar}
    assert len(files) == 36
    for name, data in files.items():
        if name.endswith(".jpg"):
            image = np.asarray(Image.open(io.BytesIO(data)), float)
            meta = json.loads(files[name.replace("jpg", "json")])
            assert image.shape == (meta["height"], meta["width"], 3) and 200 <= max(image.shape) <= 300
            assert image.std() > 15  # no blank picture
        elif name.endswith(".txt"):
            assert 5 <= len(data.split()) <= 22


def test_quality_is_that_of_the_decoder(folder):
    found = bench.quality(folder, 8)
    assert found["psnr_db"] >= 35 and found["psnr_db_worst"] <= found["psnr_db"] <= found["psnr_db_median"] + 3


def test_the_report_has_every_row_and_ratios_by_round(monkeypatch, capsys):
    monkeypatch.setattr(bench, "RIVALS", {name: bench.RIVALS[name] for name in ("loader", "peer", "decode_eighth")})
    real, runs = bench._run, []

    def once(rival, folder, images):
        """Fresh processes are checked once; a second round is made up of numbers."""
        runs.append(rival)
        return real(rival, folder, images) if len(runs) <= 3 else {"cpu_s": {"loader": 1.0, "peer": 5.0}.get(rival, 0.1), "wall_s": 2.0}

    monkeypatch.setattr(bench, "_run", once)
    monkeypatch.setattr(bench, "measure", lambda rounds, measure=bench.measure: measure(rounds, images=64, shards=1, per_shard=64))
    assert bench.main(rounds=2) == 0
    found = json.loads(capsys.readouterr().out)
    assert runs == ["loader", "peer", "decode_eighth"] * 2
    assert {"images_per_cpu_second", "peer_images_per_cpu_second", "ratio", "psnr_db", "versions"} <= found.keys()
    assert 640.0 in found["rows"]["decode_eighth"]["spread"] and 5.0 in found["ratio_spread"]
    assert 0 < found["images_per_cpu_second"] < found["rows"]["decode_eighth"]["images_per_cpu_second"]


def test_what_it_cannot_do_is_said():
    with pytest.raises(ValueError, match="no --config"):
        bench.main("configs/x.py")
    with pytest.raises(ValueError, match="--rounds is 0"):
        bench.main(rounds=0)
