"""`jaxvl sweep`: plan all trials, run those that are not over, tell what was found."""
import os
from collections import Counter
from pathlib import Path

from jaxvl.progress import progress, say
from jaxvl.sweep import folder as folders, local, page, plan, results
from jaxvl.sweep.folder import OVER, Record
from jaxvl.sweep.options import SweepError

STOPPED = 143  # exit status of a sweep that a signal stopped: the same command goes on


def run(path: str, workdir: Path, overrides: list[str], *, workers: int = 1, tiny: bool = False, retry: bool = False, command: local.Command = local.train_command) -> int:
    """Run, or continue, the sweep of the config file `path` in `workdir`.

    Returns 0 where all trials are done or pruned, 1 where some have failed, STOPPED where a signal came.
    Raises ValueError for what is wrong in the sweep, before any trial runs, and LockedError where another sweep has the folder.
    """
    if workers < 1:
        raise SweepError(f"--workers is {workers}; it must be at least 1")
    base = plan.load(path, overrides, tiny=tiny)
    trials = plan.trials(base)
    env = local.share_devices(workers, os.environ)
    with folders.lock(workdir):
        folders.keep_options(workdir, base.options, [trial.name for trial in trials])
        records = [folders.prepare(workdir, trial, retry=retry) for trial in trials]
        waiting = [record for record in records if record.status not in OVER]
        steps = {trial.name: trial.config.train.steps for trial in trials}
        unit = "steps"
        if not all(steps.values()):  # a run of epochs finds its steps when it opens its data
            steps, unit = dict.fromkeys(steps, 1), "trials"
        say(f"sweep {workdir}: {len(trials)} trials, {_count(records)}; {workers} at a time")
        done = sum(steps[record.name] for record in records if record.status in OVER)
        with progress(text="sweep", total=sum(steps.values()), unit=unit, done=done) as bar:
            stopped = local.run(workdir, base.options, waiting, bar, steps=steps, workers=workers, command=command, env=env, ended=_tell)
        report(workdir)
    if stopped:
        say("stopped: what ran is saved; the same command continues there")
        return STOPPED
    return int(any(folders.read_record(workdir, trial.name).status == "failed" for trial in trials))


def report(workdir: Path) -> Path:
    """Write results.csv, rows.csv and sweep.html of the sweep in `workdir` and print its table; returns the page."""
    found = results.gather(workdir)
    tables = results.write_tables(workdir, found)
    written = page.write_page(workdir, found)
    results.print_found(workdir, found)
    print(f"report: {written} ({', '.join(path.name for path in tables)})", flush=True)
    return written


def _tell(record: Record) -> None:
    say(f"{record.name}: {record.status}" + (f", {record.reason}" if record.reason else ""))


def _count(records: list[Record]) -> str:
    return ", ".join(f"{n} {status}" for status, n in Counter(record.status for record in records).items())
