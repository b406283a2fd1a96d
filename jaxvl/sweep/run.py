"""`jaxvl sweep`: plan all trials, run those that are not over, tell what was found."""

import os
from collections import Counter
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

from jaxvl import compiled
from jaxvl.progress import progress, say
from jaxvl.sweep import folder as folders, local, page, plan, results, scheduler
from jaxvl.sweep.folder import OVER, Record
from jaxvl.sweep.options import SweepError
from jaxvl.sweep.scheduler import Launch, Source
from jaxvl.terminal import tell

STOPPED = 143  # exit status of a sweep that a signal stopped: the same command goes on


def run(path: str, workdir: Path, overrides: list[str], *, workers: int = 1, tiny: bool = False, retry: bool = False, slurm: str | None = None,
        command: local.Command = local.train_command) -> int:  # fmt: skip
    """Run, or continue, the sweep of the config file `path` in `workdir`.

    workers: trials at a time. retry: run failed trials again. slurm: parameters of submitit for a job a trial, None for processes here.
    Returns 0 where all trials are done or pruned, 1 where some have failed, STOPPED where a signal came.
    Raises ValueError for what is wrong in the sweep, before any trial runs, and LockedError where another sweep has the folder.
    """
    if workers < 1:
        raise SweepError(f"--workers is {workers}; it must be at least 1")
    base = plan.load(path, overrides, tiny=tiny)
    # Trials that differ in the seed alone are one program, which is then compiled once.
    env = {compiled.VARIABLE: os.environ.get(compiled.VARIABLE, str(workdir.resolve() / compiled.FOLDER))}
    launch = _launcher(workdir, command, workers, env, slurm)
    with _opened(base, workdir, retry) as (source, records, total):
        say(f"sweep {workdir}: {total} trials, {_count(records) or 'none begun'}; {workers} at a time")
        length = source.length(records[0].name if records else "")
        done = sum(source.length(record.name) for record in records if record.status in OVER)
        every = sum(source.length(record.name) for record in records) + (total - len(records)) * length

        def over(record: Record) -> None:
            say(f"{record.name}: {record.status}" + (f", {record.reason}" if record.reason else ""))
            source.over(record)

        with progress(text="sweep", total=every, unit="steps" if every > total else "trials", done=done) as bar:
            stopped = scheduler.run(workdir, base.options, source._replace(over=over), bar, launch, workers=workers)
        found = report(workdir)
    if stopped:
        say("stopped: what ran is saved; the same command continues there")
        return STOPPED
    return int(any(result.record.status == "failed" for result in found.results()))


def report(workdir: Path) -> results.Found:
    """Write results.csv, rows.csv and sweep.html of the sweep in `workdir`, print its table, and return what was found."""
    found = results.gather(workdir)
    tables = results.write_tables(workdir, found)
    written = page.write_page(workdir, found)
    results.print_found(workdir, found)
    tell(f"report: {written} ({', '.join(path.name for path in tables)})")
    return found


@contextmanager
def _opened(base: plan.Base, workdir: Path, retry: bool) -> Iterator[tuple[Source, list[Record], int]]:
    """The trials of a sweep: where they come from, the records there are, and how many trials there will be. Holds the folder's lock."""
    if base.options.sampler == "tpe":
        from jaxvl.sweep import study

        with study.opened(base, workdir, retry=retry) as found:
            yield found
        return
    trials = plan.trials(base)
    folders.check_credentials(base.options, trials)
    with folders.lock(workdir):
        for trial in trials:  # a sweep that is refused at its last trial has changed none before
            folders.begun(workdir, trial, retry=retry)
        folders.keep_options(workdir, base.options, [trial.name for trial in trials])
        records = [folders.prepare(workdir, trial, retry=retry) for trial in trials]
        waiting = iter([record for record in records if record.status not in OVER])
        yield Source(lambda: next(waiting, None), lambda _: None, plan.lengths(trials)), records, len(trials)


def _launcher(workdir: Path, command: local.Command, workers: int, env: dict[str, str], slurm: str | None) -> Launch:
    if slurm is None:
        return local.launcher(command, workers, env)
    from jaxvl.sweep import slurm as jobs

    return jobs.launcher(command, workdir, env, slurm)


def _count(records: list[Record]) -> str:
    return ", ".join(f"{n} {status}" for status, n in Counter(record.status for record in records).items())
