"""words.html: what a run's model sees and reads, in words; one self-contained page, its data beside it as words.json."""

import base64
import html
import io
import json
from collections.abc import Collection, Sequence
from pathlib import Path
from typing import Any

import numpy as np
from PIL import Image

from jaxvl.gallery import Explained, Seen, Sought
from jaxvl.report.metrics import write_atomic
from jaxvl.report.page import clipped, section, write_document

ORANGE = (217, 72, 15)  # of a map, as opaque as the patch is strong
STYLE = """
.card{display:grid;grid-template-columns:150px minmax(190px,250px) minmax(200px,1fr) minmax(190px,260px);gap:6px 26px;padding:16px 0;
border-top:1px solid var(--line)}
.card h3,.word h3{margin:0 0 6px;font-size:12px;font-weight:500;color:var(--soft);text-transform:uppercase;letter-spacing:.05em}
.card img.big{width:136px;max-width:136px;max-height:136px}.card q{font-weight:600;margin-top:8px}
.card .hit-rank{font-size:13px}
.entries{display:grid;grid-template-columns:minmax(70px,auto) 1fr auto;gap:3px 10px;align-items:center;font-size:14px;
font-variant-numeric:tabular-nums}.entries i{display:block;height:9px;border-radius:3px;background:var(--c)}
.entries small{font-size:12px}.said{font-weight:700}.said::after{content:" ✓";color:var(--right)}
.maps{display:flex;flex-wrap:wrap;gap:10px}.maps figure{width:88px}.maps figcaption{font-size:13px;font-weight:500;text-align:center;
overflow-wrap:anywhere;line-height:1.25;margin-top:3px}
.map{position:relative;width:88px;height:88px;border-radius:5px;overflow:hidden;background:#fff}
.map::before{content:"";position:absolute;inset:0;background:var(--p) center/100% 100%;filter:grayscale(1) brightness(1.12) contrast(.75)}
.map img{position:absolute;inset:0;width:100%;height:100%;max-width:none;max-height:none;min-width:0;border-radius:0;background:none;
image-rendering:pixelated}
.word{padding:14px 0;border-top:1px solid var(--line)}.word h3{font-size:17px;font-weight:600;color:var(--ink);text-transform:none;
letter-spacing:0}
.sought{display:grid;grid-template-columns:repeat(auto-fit,minmax(min(100%,500px),1fr));gap:0 40px}
.clouds{display:grid;grid-template-columns:repeat(auto-fit,minmax(330px,1fr));gap:22px 60px}
@media(max-width:900px){.card{grid-template-columns:150px 1fr}}@media(max-width:640px){.card{grid-template-columns:1fr}}
"""
LEGEND = (
    "<p>Left: the image and its caption, with the caption's rank among all. Then its greatest entries; a tick marks the caption's own words. "
    "Maps: where in the image a word is, on one scale for an image and clear below the threshold. "
    "Right: the words that image and caption share, each with its part of their score.</p>"
)
SOUGHT = (
    "<p>The words that the captions say most, in the images where each is greatest, with its entry there. "
    "Maps of a word are on one scale, clear at the least of their patches.</p>"
)


def write_words(folder: Path, title: str, step: int, found: Explained) -> Path:
    """Write words.html and words.json to `folder`; returns the path of the page."""
    path = folder / "words.html"
    write_atomic(folder / "words.json", json.dumps(plain(found, step), ensure_ascii=False))
    sections = (
        _head(title, step, found),
        section("Most used words", _most_used(found)),
        section(f"{len(found.images)} images in words", LEGEND + "".join(_card(seen, found) for seen in found.images)),
        section("Words in images", SOUGHT + f'<div class="sought">{"".join(map(_word, found.words))}</div>') if found.words else "",
    )
    write_document(path, f"{title} in words", "".join(sections), style=STYLE)
    return path


def plain(found: Explained, step: int) -> dict[str, Any]:
    """The data of the page for other programs; pictures are left out, maps are lists of rows."""
    rounded = lambda grid: [[round(float(v), 5) for v in row] for row in grid]
    return {
        "step": step, "threshold": found.threshold, "set_size": found.size, "numbers": found.numbers, "most_used": found.most_used,
        "images": [
            {"caption": s.caption, "caption_words": s.spoken, "words": s.words, "shared": s.shared, "score": s.score, "rank": s.rank, "maps": {w: rounded(m) for w, m in s.maps.items()}}
            for s in found.images
        ],
        "words": [{"word": s.word, "images": [{"entry": entry, "map": rounded(grid)} for _, entry, grid in s.images]} for s in found.words],
    }  # fmt: skip


def _head(title: str, step: int, found: Explained) -> str:
    percent = lambda key: f"{100 * value:.1f} %" if (value := found.numbers.get(key, float("nan"))) == value else "none"
    start = next((key.partition("/")[0] for key in found.numbers), "words@0")
    count = start.partition("@")[2]
    tiles = (
        (percent(f"{start}/any"), f"of images have a word of their caption in their {count} first"),
        (percent(f"{start}/words"), "of the captions' words are found there"),
        (percent(f"{start}/other_any"), "of images, for the caption of another one"),
        (f"{found.size:,}", "images held out"),
    )
    cells = "".join(f"<div><b>{html.escape(big)}</b><span>{html.escape(small)}</span></div>" for big, small in tiles)
    facts = f"<span><em>step</em> {step:,}</span><span><em>kept above</em> {found.threshold:.4f}, 1/√V unless set</span>"
    return f'<header><h1>{html.escape(title)} in words</h1><div class="facts">{facts}</div><div class="tiles">{cells}</div></header>'


def _most_used(found: Explained) -> str:
    """Of each side the words with the greatest mean entry; a bar is the share of vectors in which the word is active."""
    columns = []
    for side, rows in found.most_used.items():
        entries = _entries([(word, share, f"{100 * share:.0f} %") for word, _, share in rows], 1.0, 0 if side == "image" else 2)
        columns.append(
            f"<div><h3>{html.escape(side)}s, by mean entry; the bar is the share of {html.escape(side)}s in which the word is active</h3>{entries}</div>"
        )
    return f'<div class="clouds">{"".join(columns)}</div>'


def _card(seen: Seen, found: Explained) -> str:
    most = seen.words[0][1] if seen.words else 1.0
    said = set(seen.spoken)
    words = _entries([(word, weight, f"{weight:.3f}") for word, weight in seen.words], most, 0, said)
    shared = (
        _entries([(word, part, f"{100 * part / seen.score:.1f} %") for word, part in seen.shared], seen.shared[0][1], 2)
        if seen.shared
        else "<p>no word</p>"
    )
    high = max((float(grid.max()) for grid in seen.maps.values()), default=1.0)
    maps = "".join(_map(word, grid, found.threshold, high, word in said) for word, grid in seen.maps.items())
    picture = _data(seen.picture)
    rank = f'<p class="hit-rank">caption ranks {seen.rank + 1:,} of {found.size:,}</p>'
    return (
        f'<div class="card" style="--p:url({picture})"><div><img class="big" alt="" src="{picture}">{clipped(seen.caption)}{rank}</div>'
        f"<div><h3>words</h3>{words}</div><div><h3>where</h3><div class=\"maps\">{maps}</div></div>"
        f"<div><h3>shared with the caption, {seen.score:.3f}</h3>{shared}</div></div>"
    )  # fmt: skip


def _word(sought: Sought) -> str:
    """A word with its images, their maps on one scale."""
    high = max(float(grid.max()) for _, _, grid in sought.images)
    low = min(float(grid.min()) for _, _, grid in sought.images)
    maps = "".join(
        f'<div style="--p:url({_data(picture)})">{_map(f"{entry:.3f}", grid, low, high)}</div>' for picture, entry, grid in sought.images
    )
    return f'<div class="word"><h3>{html.escape(sought.word)}</h3><div class="maps">{maps}</div></div>'


def _map(label: str, grid: np.ndarray, low: float, high: float, said: bool = False) -> str:
    caption = f'<span class="said">{html.escape(label)}</span>' if said else html.escape(label)
    overlay = f'<img alt="map of {html.escape(label)}" src="{_data(heat(grid, low, high))}">'
    return f'<figure><div class="map">{overlay}</div><figcaption>{caption}</figcaption></figure>'


def heat(grid: np.ndarray, low: float, high: float) -> bytes:
    """PNG of a pixel for each patch: clear at `low` and below, nearly opaque at `high`."""
    share = np.clip((np.asarray(grid, np.float64) - low) / max(high - low, 1e-12), 0, 1)
    pixels = np.empty((*share.shape, 4), np.uint8)
    pixels[..., :3], pixels[..., 3] = ORANGE, np.round(215 * share)
    out = io.BytesIO()
    Image.fromarray(pixels).save(out, "PNG")
    return out.getvalue()


def _entries(rows: Sequence[tuple[str, float, str]], most: float, colour: int, said: Collection[str] = ()) -> str:
    """Words with bars of their values, `most` the full width, and a text."""
    cells = []
    for word, value, text in rows:
        name = f'<span class="said">{html.escape(word)}</span>' if word in said else f"<span>{html.escape(word)}</span>"
        cells.append(
            f'{name}<i class="c{colour}" style="width:{100 * value / most if most else 0:.1f}%"></i><small>{html.escape(text)}</small>'
        )
    return f'<div class="entries">{"".join(cells)}</div>'


def _data(picture: bytes) -> str:
    return f"data:image/png;base64,{base64.b64encode(picture).decode()}"
