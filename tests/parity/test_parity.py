"""Every file of JAXVL_PARITY_DIR against the numbers in it; a file of a kind that no checker knows fails.

A new family is one import and one line of FAMILIES: a dict from the name of a kind to its Check.
"""

import os
from pathlib import Path

import pytest

from tests.parity import codis, hf, hpl, jvsm, lexvla, lexvla_model, metrics, tcl, tcl_eval
from tests.parity.case import Case, Check

FAMILIES: dict[str, dict[str, Check]] = {
    "codis": codis.CHECKS,
    "hf": hf.CHECKS,
    "jvsm": jvsm.CHECKS,
    "hpl": hpl.CHECKS,
    "lexvla": {**lexvla.CHECKS, **lexvla_model.CHECKS},
    "metrics": metrics.CHECKS,
    "tcl": {**tcl.CHECKS, **tcl_eval.CHECKS},
}
FOLDER = Path(os.environ.get("JAXVL_PARITY_DIR") or Path(__file__).parent.parent / "fixtures" / "parity")


def cases(folder: Path) -> list[Path]:
    """Every file below `folder` but notes (*.md), a folder with an io.npz being one case with all that is in it."""
    files = sorted(p for p in folder.rglob("*") if p.is_file() and p.suffix != ".md")
    models = {p.parent for p in files if p.name == "io.npz"}
    return sorted({next((m for m in models if m in p.parents), p) for p in files})


def kind_of(case: Case) -> tuple[str, Check]:
    """The one kind that fits the content; where several do, the folder's family and then the file's name decide."""
    found = {(family, kind): check for family, checks in FAMILIES.items() for kind, check in checks.items() if check.fits(case)}
    for prefer in (lambda family, _: family in case.path.parts, lambda _, kind: case.path.name.startswith(kind)):
        if len(found) > 1:
            found = {key: check for key, check in found.items() if prefer(*key)} or found
    if len(found) != 1:
        known = [f"{family}/{kind}" for family, checks in FAMILIES.items() for kind in checks]
        what = f"may be any of {sorted(found)}" if found else f"is of no known kind ({', '.join(known)})"
        pytest.fail(f"{case.path} {what}; it holds {', '.join(sorted(case))}")
    (_, kind), check = next(iter(found.items()))
    return kind, check


@pytest.mark.parity
@pytest.mark.parametrize("path", cases(FOLDER), ids=lambda path: path.relative_to(FOLDER).as_posix())
def test_parity(path: Path) -> None:
    if path.is_file() and path.suffix not in (".npz", ".json"):
        pytest.fail(f"{path} is of no known kind: a parity case is an .npz, a .json or a model folder with an io.npz")
    case = Case(path)
    kind, check = kind_of(case)
    check.run(case)
    assert not case.unread(), f"the checker of {kind!r} compares nothing with {case.unread()} of {path}"


@pytest.mark.parity
def test_the_folder_holds_cases() -> None:
    assert cases(FOLDER), f"JAXVL_PARITY_DIR={FOLDER} holds no parity files"
