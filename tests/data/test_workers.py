"""Worker processes of indexing and checking: they end with the process that started them, and with whatever ends their work."""

import os
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest

from jaxvl.data import indexing

PARENT = """
import sys
from jaxvl.data import indexing
import test_workers
if __name__ == "__main__":
    try:
        list(indexing.parallel(test_workers.sleeps, sys.argv[1], [0, 1], 2))
    except KeyboardInterrupt:
        sys.exit(130)
"""


def sleeps(folder: str, item: int) -> None:
    """Says which process it is, and works for ever."""
    Path(folder, str(item)).write_text(str(os.getpid()))
    time.sleep(600)


def ends(folder: str, item: int) -> None:
    os.kill(os.getpid(), signal.SIGKILL)


def alive(number: int) -> bool:
    try:
        return Path(f"/proc/{number}/stat").read_text().rpartition(")")[2].split()[0] != "Z"
    except OSError:
        return False


def until(true) -> bool:
    end = time.monotonic() + 60
    while not (found := true()) and time.monotonic() < end:
        time.sleep(0.05)
    return found


@pytest.mark.skipif(sys.platform != "linux", reason="Linux tells a process of its parent's end")
@pytest.mark.parametrize("number, status, everybody", [(signal.SIGINT, 130, True), (signal.SIGKILL, -9, False)], ids=["ctrl-c", "killed"])
def test_workers_end_with_their_parent(tmp_path, number, status, everybody):
    """Ctrl-C comes to all processes of a terminal, and none of them tells where it was; a kill comes to the first alone."""
    script = tmp_path / "script.py"
    script.write_text(PARENT)
    env = {**os.environ, "PYTHONPATH": os.pathsep.join([str(Path(__file__).parent), str(Path(__file__).parents[2])])}
    (tmp_path / "pids").mkdir()
    allowed = lambda: signal.signal(signal.SIGINT, signal.default_int_handler)
    parent = subprocess.Popen([sys.executable, str(script), str(tmp_path / "pids")], env=env, stderr=subprocess.PIPE, text=True,
                              start_new_session=True, preexec_fn=allowed)  # fmt: skip
    pids = lambda: [int(text) for p in (tmp_path / "pids").iterdir() if (text := p.read_text())]
    try:
        assert until(lambda: len(pids()) == 2)
        (os.killpg if everybody else os.kill)(parent.pid, number)
        assert parent.wait(30) == status
        assert until(lambda: not any(map(alive, pids())))
        assert "Traceback" not in parent.stderr.read()
    finally:
        if parent.poll() is None:
            os.killpg(parent.pid, signal.SIGKILL)


def test_a_worker_that_is_killed_is_told(tmp_path):
    from jaxvl import faults

    with pytest.raises(RuntimeError) as error:
        list(indexing.parallel(ends, str(tmp_path), [0, 1], 2))
    assert "memory" in faults.sentence(error.value)
