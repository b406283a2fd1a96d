"""Shards with everything that goes wrong in shards, and a manifest of what must and must not come out of each.

    python -m tests.data.broken_shards FOLDER

A key is a member's base name up to its first dot. Of each shard, `good_keys` must be delivered and `bad_keys` must not;
`free_keys` may be either, but count.
"""

import json
import os
import sys
from pathlib import Path

from tests.data.broken_case import Case
from tests.data.broken_samples import captions, pictures
from tests.data.broken_tars import entries, structure


def files() -> dict[str, Case]:
    """Files that only look like shards."""
    cases: dict[str, Case] = {}
    for name, make in (
        ("a FIFO", os.mkfifo),
        ("a folder", os.mkdir),
        ("a link to nothing", lambda path: os.symlink("nowhere", path)),
    ):
        cases[name] = Case("nothing, and no waiting")
        cases[name].special = make
    return cases


def write(folder: Path) -> Path:
    """Write all shards and manifest.json into `folder`."""
    folder.mkdir(parents=True, exist_ok=True)
    listed = []
    for number, (problem, case) in enumerate((structure() | entries() | pictures() | captions() | files()).items()):
        path = folder / f"{number:02d}-{problem.replace(' ', '-').replace(',', '')}.tar"
        if case.special:
            case.special(path)
        else:
            path.write_bytes(case.tar() if case.data is None else case.data)
        keys = {"good_keys": case.good, "bad_keys": case.bad, "free_keys": case.free}
        listed.append({"file": path.name, "problem": problem, "expected": case.expected, **keys})
    (folder / "manifest.json").write_text(json.dumps({"shards": listed}, indent=1, ensure_ascii=False))
    return folder


if __name__ == "__main__":
    print(write(Path(sys.argv[1])))
