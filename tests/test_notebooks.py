"""The notebooks run from top to bottom, as a reader would run them, with few steps."""

import json
import os
import subprocess
import sys
from pathlib import Path

import pytest
from running import FAST

ROOT = Path(__file__).parent.parent


@pytest.mark.parametrize("file", sorted((ROOT / "notebooks").glob("*.ipynb")), ids=lambda f: f.stem)
def test_every_cell_runs(file, tmp_path):
    notebook = json.loads(file.read_text())
    assert not any(cell.get("outputs") for cell in notebook["cells"]), "clear the outputs before committing"
    script = tmp_path / "cells.py"
    script.write_text("\n\n".join("".join(cell["source"]) for cell in notebook["cells"] if cell["cell_type"] == "code"))
    env = {**os.environ, "MPLBACKEND": "Agg", "STEPS": "3", "XLA_FLAGS": FAST, "PYTHONPATH": str(ROOT)}
    done = subprocess.run([sys.executable, script], cwd=ROOT, env=env, capture_output=True, text=True, timeout=300)
    assert done.returncode == 0, done.stderr[-3000:]
    assert "image-to-text R@1" in done.stdout
