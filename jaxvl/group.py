"""The processes of one run on this machine, with one fate: python -m jaxvl.group --processes N COMMAND...

Where one member fails the others cannot go on: they are asked to end, killed after a grace period, and all are started anew,
which continues from the newest whole checkpoint. This is what Slurm or Kubernetes does for a run of many machines.
"""

import argparse
import os
import signal
import socket
import subprocess
import sys
import time
from collections.abc import Sequence
from pathlib import Path

from jaxvl import manifest
from jaxvl.processes import GRACE, gpu_shares, tied
from jaxvl.progress import say

POLL = 0.1  # seconds between two looks at the members
TERMINATED = 128 + signal.SIGTERM  # also that of a run which SIGTERM has had save and leave
FOR_A_PERSON = 2  # exit status of what a restart cannot mend: a wrong config, a full disk


def main(argv: Sequence[str] | None = None) -> int:
    """Entry point; returns 0, 143 where SIGTERM stopped the run, or the exit status of the member that failed last."""
    parser = argparse.ArgumentParser(prog="launch/local", description=__doc__)
    parser.add_argument("--processes", type=int, required=True, help="members of the run; GPUs are divided among them")
    parser.add_argument(
        "--restarts",
        type=int,
        default=3,
        help="how often in a row a failed run is started again without having saved a newer checkpoint in between",
    )
    parser.add_argument(
        "--grace", type=float, default=GRACE, help="seconds between SIGTERM and SIGKILL for the members left by one that failed"
    )
    parser.add_argument(
        "--pause",
        type=float,
        default=0.0,
        help="seconds before a restart; where other machines have members of the run, at least 20: theirs must have ended too",
    )
    parser.add_argument("command", nargs=argparse.REMAINDER, help="jaxvl train --config=... --workdir=...")
    args = parser.parse_args(argv)
    command = args.command[1:] if args.command[:1] == ["--"] else args.command
    if args.processes < 1 or min(args.restarts, args.grace, args.pause) < 0 or not command:
        parser.error("--processes must be at least 1, --restarts, --grace and --pause at least 0, and a command must follow")
    try:
        return run(command, processes=args.processes, restarts=args.restarts, grace=args.grace, pause=args.pause)
    except ValueError as error:
        parser.error(str(error))


def run(command: list[str], *, processes: int, restarts: int, grace: float, pause: float = 0.0) -> int:
    """Run the group until it ends well, is told to stop, or has failed `restarts` times and once more without a newer checkpoint. Returns as `main`."""
    shares = gpu_shares(processes, os.environ)
    workdir = _workdir(command)
    signals: list[int] = []
    before = {number: signal.signal(number, lambda n, _: signals.append(n)) for number in (signal.SIGINT, signal.SIGTERM)}
    attempt, reached = 0, _newest(workdir)
    try:
        while True:
            members = _start(tied(command, grace), shares, workdir)
            status = _watch(members, signals, grace)
            status = 128 - status if status < 0 else status
            if signals or status in (0, TERMINATED):
                return status
            newest = _newest(workdir)
            # A run that gets on may be restarted for months; one that fails before it has saved anything new is broken.
            attempt, reached = (1, newest) if newest > reached else (attempt + 1, reached)
            if status == FOR_A_PERSON or attempt > restarts:
                return status
            say(f"restart {attempt} of {restarts}" + (f", from step {newest:,}" if newest >= 0 else ""))
            until = time.monotonic() + pause
            while not signals and time.monotonic() < until:
                time.sleep(POLL)
            if signals:
                return TERMINATED
    finally:
        for number, handler in before.items():
            signal.signal(number, handler)


def _workdir(command: list[str]) -> Path | None:
    """Of --workdir=DIR or --workdir DIR."""
    for i, word in enumerate(command):
        name, equals, value = word.partition("=")
        if name == "--workdir" and (equals or i + 1 < len(command)):
            return Path(value if equals else command[i + 1])
    return None


def _newest(workdir: Path | None) -> int:
    """The newest whole checkpoint, -1 where there is none."""
    try:
        return max(manifest.whole_steps(workdir / "checkpoints"), default=-1) if workdir else -1
    except OSError:  # the run itself says what is wrong with the folder
        return -1


def _start(command: list[str], shares: list[dict[str, str]], workdir: Path | None) -> list[subprocess.Popen]:
    """One process a share. The first speaks for all; what the others say, errors only, is kept beside the run."""
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        port = probe.getsockname()[1]
    members = []
    for i, share in enumerate(shares):
        env = {**os.environ, **share}
        if len(shares) > 1:
            env |= {"JAX_COORDINATOR_ADDRESS": f"127.0.0.1:{port}", "JAX_NUM_PROCESSES": str(len(shares)), "JAX_PROCESS_ID": str(i)}
        if i and workdir:
            (workdir / "report").mkdir(parents=True, exist_ok=True)
            with open(workdir / "report" / f"process-{i}.log", "a", encoding="utf-8") as log:
                members.append(
                    subprocess.Popen(
                        command, env=env, stdin=subprocess.DEVNULL, stdout=log, stderr=subprocess.STDOUT, start_new_session=True
                    )
                )
        else:
            members.append(subprocess.Popen(command, env=env, stdin=subprocess.DEVNULL, start_new_session=True))
    return members


def _watch(members: list[subprocess.Popen], signals: list[int], grace: float) -> int:
    """Wait until all members have ended: the exit status of the first that failed, which is said when it is seen, or 0.

    A first signal is passed on to all, which then save at one step and end; a second one kills them.
    """
    first, deadline, passed = 0, float("inf"), 0
    while True:
        if len(signals) > passed:
            passed = len(signals)
            _send(members, signal.SIGTERM if passed == 1 else signal.SIGKILL)
        statuses = [member.poll() for member in members]
        for i, status in enumerate(statuses):
            if status and not first:
                first = status
                # Members that SIGTERM ended do so together; any other end leaves the rest waiting for a peer that is gone.
                deadline = time.monotonic() + grace
                if status not in (TERMINATED, -signal.SIGTERM) and passed < 2:
                    say(f"process {i} of {len(members)} {_ended(status)}")
                    _send(members, signal.SIGTERM)
        if None not in statuses:
            return first
        if time.monotonic() > deadline:
            _send(members, signal.SIGKILL)
        time.sleep(POLL)


def _send(members: list[subprocess.Popen], number: int) -> None:
    for member in members:
        if member.poll() is None:
            os.killpg(member.pid, number)


def _ended(status: int) -> str:
    return f"was killed by {signal.Signals(-status).name}" if status < 0 else f"ended with exit status {status}"


if __name__ == "__main__":
    sys.exit(main())
