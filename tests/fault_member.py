"""`jaxvl train` with a fault in one process of the run: python fault_member.py FAULT ARGS...

FAULT is KIND:PROCESS:VALUE. slow:1:0.3, each batch takes 0.3 s longer; hang:1:12, batch 12 never comes; clock:1:86400, its clock is a day ahead.
"""

import os
import sys
import time

from jaxvl import cli, train
from jaxvl.data import stream


def main() -> int:
    kind, process, value = sys.argv[1].split(":")
    if os.environ.get("JAX_PROCESS_ID", "0") == process:
        if kind == "clock":
            now = time.time
            time.time = lambda: now() + float(value)
        else:
            train.train_batches = lambda *args, **kwargs: _batches(kind, float(value), stream.train_batches(*args, **kwargs))
    return cli.main(["train", *sys.argv[2:]])


def _batches(kind, value, batches):
    try:
        for i, batch in enumerate(batches, 1):
            while kind == "hang" and i == value:
                time.sleep(0.1)  # the process lives, its heart beats, and no batch comes
            time.sleep(value if kind == "slow" else 0)
            yield batch
    finally:
        batches.close()


if __name__ == "__main__":
    sys.exit(main())
