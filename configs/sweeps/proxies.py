"""Proxy losses with and without a hierarchy on classes that training has not seen, three seeds each.

Every hierarchy, given or learned, has as many coarse proxies as the given one has groups, whatever the recipe says.

jaxvl sweep --config=configs/sweeps/proxies.py --workdir=runs/proxies                 the embedded glyphs, unseen letters
jaxvl sweep --config=configs/sweeps/proxies.py:emoji --workdir=runs/proxies_emoji     reads emoji/train-*.tar, emoji/val-*.tar
"""

GROUPS = {"glyphs": 288, "emoji": 97}  # letters without case and accents of the 452 characters; subgroups of the 1,362 emoji


def sweep(data: str = "glyphs") -> dict:
    none, nca = {"method.hierarchy": "none"}, {"method.base_loss": "proxy_nca_pp"}
    equal = {"method.num_coarse": (GROUPS[data],)}
    learned = lambda mode: {"method.hierarchy": "learned", "method.coarse_mode": mode, **equal}
    rows = {
        "Proxy-Anchor": none,
        "HPL, given hierarchy": {"method.hierarchy": "given", **equal},
        "HPL, learned, frozen": learned("frozen"),
        "HPL, learned, free": learned("free"),
        "HPL, learned, tied": learned("tied"),
        "Proxy-NCA++": {**none, **nca},
        "Proxy-NCA++ with HPL": {**learned("free"), **nca},
    }
    base = {"config": f"../hpl_small.py:{data}"}
    if data == "emoji":
        base |= {"data.source": "emoji/train-*.tar", "evals.val.source": "emoji/val-*.tar"}
    return dict(metric="val/r@1", also=("val/map@r",), rows={name: {**base, **row} for name, row in rows.items()}, seeds=(0, 1, 2))
