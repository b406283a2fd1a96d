import base64
import html.parser
import io
import json
import re
import shutil

import numpy as np
import pytest
from PIL import Image

from jaxvl.gallery import Gallery, Hit, Query, Table
from jaxvl.losses.codebook import usage
from jaxvl.report import goodput, metrics, page
from jaxvl.report.page import save_galleries, write_report


def png(grey):
    out = io.BytesIO()
    Image.new("L", (8, 8), grey).save(out, "PNG")
    return out.getvalue()


NASTY = "<script>alert('x')</script> \x00 & \"quoted\" \n 漢字 " + "long " * 100


@pytest.fixture
def workdir(tmp_path):
    run = tmp_path / "run <1>"
    folder = run / "report"
    folder.mkdir(parents=True)
    writer = metrics.jsonl_writer(run / "metrics.jsonl")
    for step in range(1, 9):
        times = {f"time/{k}_ms": float(step) for k in ("step", "data", "transfer", "compute", "other")}
        loss = float("nan") if step == 4 else 8.0 / step
        writer.write(
            step,
            {
                "samples": 8 * step,
                "epoch": step / 4,
                "loss": loss,
                "temperature": 0.07,
                "samples_per_s": 99.0,
                "mfu": 0.4,
                **times,
            },
        )
        if step % 4 == 0:
            writer.write(step, {"val/i2t/r@1": step / 10, "val/t2i/r@1": step / 20, "zeroshot/accuracy": 0.5})
    writer.close()
    goodput.save_sessions(folder, [goodput.Session(1e9, 0, 8, 8, {"compute": 90.0, "eval": 10.0})])
    metrics.write_atomic(folder / "facts.json", json.dumps({"config": "seed: <0>", "devices": "8 x cpu", "versions": {"jax": "1.2"}}))
    bad = [("a.tar", "k1", "empty"), ("a.tar", "k2", "empty"), ("b\udcff.tar", "k1", "bomb")]
    lines = [metrics.encode(dict(zip(("shard", "key", "reason"), row, strict=True))) for row in bad]
    (folder / "bad-0.jsonl").write_text("".join(line + "\n" for line in lines[:2]))
    (folder / "bad-1.jsonl").write_text(lines[2] + "\n")
    found = Query(png(10), (Hit("right caption", 0.9, True), Hit(NASTY, 0.8, False)), 0, "right caption")
    missed = Query(NASTY, (Hit(png(20), 0.5, False),), 41, png(30))
    save_galleries(folder, 4, [Gallery("val: image to text", (missed,))])
    save_galleries(folder, 8, [Gallery("val: image to text", (found,)), Gallery("val: text to image", (missed,))])
    return run


class Reader(html.parser.HTMLParser):
    """Every tag closed in order; collects text, attributes and tables."""

    def __init__(self, text):
        super().__init__()
        self.open, self.tags, self.words, self.rows = [], [], [], []
        self.feed(text)
        assert not self.open

    def handle_starttag(self, tag, attrs):
        self.tags.append((tag, dict(attrs)))
        if tag not in ("meta", "img"):
            self.open.append(tag)
        if tag == "tr":
            self.rows.append([])

    def handle_startendtag(self, tag, attrs):
        self.tags.append((tag, dict(attrs)))

    def handle_endtag(self, tag):
        assert self.open.pop() == tag

    def handle_data(self, data):
        self.words.append(data)
        if self.open and self.open[-1] in ("td", "th"):
            self.rows[-1].append(data)


def test_the_page_is_whole_alone_and_escaped(workdir):
    text = write_report(workdir).read_text()
    seen = Reader(text)
    assert "script" not in {tag for tag, _ in seen.tags}
    links = [v for _, attrs in seen.tags for k, v in attrs.items() if k in ("src", "href", "xlink:href")]
    assert links and all(link.startswith("data:image/png;base64,") for link in links)
    assert "http" not in text and "url(" not in text
    words = " ".join(seen.words)
    assert "<script>alert('x')</script> & \"quoted\" 漢字" in words and "\x00" not in text
    assert "seed: <0>" in words and "8 x cpu" in words and "jax 1.2" in words
    assert "image-to-text R@1 80.0 %, text-to-image R@1 40.0 %" in words


def test_galleries_show_pictures_signs_and_the_answer(workdir):
    seen = Reader(write_report(workdir).read_text())
    pictures = [base64.b64decode(attrs["src"].partition(",")[2]) for tag, attrs in seen.tags if tag == "img"]
    assert pictures == [
        png(10),
        png(20),
        png(30),
    ]  # the newest gallery of a title, and a right answer where no hit is right
    signs = [attrs["aria-label"] for tag, attrs in seen.tags if attrs.get("aria-label") in ("right", "wrong")]
    assert signs == ["right", "wrong", "wrong"]
    assert "a right one: rank 42" in " ".join(seen.words)


def test_tables_add_up(workdir):
    rows = Reader(write_report(workdir).read_text()).rows
    assert ["shard", "bomb", "empty", "all"] in rows
    assert [r[-1] for r in rows if r[0] in ("a.tar", "all")] == ["2", "3"]
    assert ["val/i2t/r@1", "0.8", "0.8", "8"] in rows and ["loss", "1"] in rows


def test_curves_and_goodput_are_there(workdir):
    text = write_report(workdir).read_text()
    captions = re.findall("<figcaption>([^<]*)", text)
    assert captions == [
        "Loss",
        "Recall val, %",
        "temperature",
        "zeroshot/accuracy",
        "Throughput, samples/s",
        "A step, ms",
        "MFU, %",
    ]
    assert "Goodput 90.0 % of 1:40" in text and "evaluation: 10.0 % (0:10)" in text


def test_a_codebook_has_its_charts(workdir):
    """Every number that the loss of a codebook logs is drawn, image and text together, and none a second time."""
    views = np.zeros((2, 4, 6))
    names = list(usage(views, views - np.log(6), views + 1 / 24))
    writer = metrics.jsonl_writer(workdir / "metrics.jsonl")
    for step in (9, 10):
        writer.write(step, {"samples": 8 * step, "epoch": step / 4, "loss": 1.0, **dict.fromkeys(names, step / 20)})
    writer.close()
    text = write_report(workdir).read_text()
    section = text.partition("<h2>Codebook</h2>")[2].partition("</section>")[0]
    charts = section.split("<figure>")[1:]
    assert len(charts) == len(page.CODES) == len({re.sub("_(image|text)$", "", name) for name in names})
    for chart in charts:
        assert chart.count("<polyline") + chart.count('<line class="line') >= (1 if "agree" in chart else 2)
        assert ("<span>" in chart and "text" in chart) or "agree" in chart
    assert "agreement: 50 %" in section
    assert "codes/" not in text.partition("<h2>Curves</h2>")[2].partition("</section>")[0]


def test_remade_from_a_copy_of_the_workdir(workdir, tmp_path):
    first = write_report(workdir).read_bytes()
    copy = tmp_path / "elsewhere" / workdir.name
    shutil.copytree(workdir, copy)
    (copy / "report.html").unlink()
    assert write_report(copy).read_bytes() == first


def test_a_run_that_logged_nothing(tmp_path):
    with pytest.raises(FileNotFoundError, match="no run was logged there"):
        write_report(tmp_path)
    (tmp_path / "report").mkdir()
    assert tmp_path.name in write_report(tmp_path).read_text()


def test_sparse_retrieval_is_one_chart_and_words_are_tables(workdir):
    writer = metrics.jsonl_writer(workdir / "metrics.jsonl")
    points = {f"lex/top{k}/{way}_r@1": k / 100 for k in (4, 16, 32) for way in ("i2t", "t2i")}
    writer.write(9, {**points, "lex/dense/i2t_r@1": 0.5, "lex/image_active": 30.0, "lex/image_density": 0.3})
    writer.close()
    save_galleries(workdir / "report", 9, [Table("lex: most used words", ("word", "mean"), (("<b>", "0.1"), ("dog", "0.05")))])
    text = write_report(workdir).read_text()
    seen = Reader(text)
    assert ["<b>", "0.1"] in seen.rows and "lex: most used words" in seen.words
    assert text.count("Recall lex by entries kept") == 2  # label and caption of one chart
    assert "entries 100" in text and "top16" not in re.sub("<table.*?</table>", "", text)
