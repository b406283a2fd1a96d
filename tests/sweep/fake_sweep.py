"""A sweep whose trials are fakes: python fake_sweep.py CONFIG WORKDIR WORKERS."""

import sys
from pathlib import Path

from jaxvl.sweep import run


def command(folder: Path) -> list[str]:
    return [sys.executable, str(Path(__file__).with_name("fake_trial.py")), str(folder)]


if __name__ == "__main__":
    sys.exit(run.run(sys.argv[1], Path(sys.argv[2]), [], workers=int(sys.argv[3]), command=command))
