"""A sweep whose next point depends on what the last ones gave: TPE (Bergstra et al., NeurIPS 2011) as Optuna has it.

The study lies in study.log, an append-only journal, so it survives any kill, and several `jaxvl sweep` processes, on several
machines that share the folder, work on one study. A trial is owned by whoever holds its lock: what a killed
worker has left is taken over, with its checkpoint, by the next one that looks.
"""

import fcntl
import importlib.util
import math
import zlib
from collections.abc import Iterator
from contextlib import ExitStack, contextmanager
from pathlib import Path
from typing import IO, Any

from jaxvl.sweep import folder as folders, plan, scheduler
from jaxvl.sweep.folder import OVER, Record
from jaxvl.sweep.options import Choice, Integer, SweepError, SweepOptions
from jaxvl.sweep.plan import Base, Trial
from jaxvl.sweep.results import chosen
from jaxvl.sweep.scheduler import Source

JOURNAL = "study.log"
OWNERS = ".owners"  # a lock a trial
FIXED = ("metric", "mode", "pick", "space")  # what makes two studies comparable


@contextmanager
def opened(base: Base, workdir: Path, *, retry: bool) -> Iterator[tuple[Source, list[Record], int]]:
    """The trials of the study in `workdir`, made where there is none: see `run._opened`. Other workers of the study may come and go.

    Raises SweepError where Optuna is not installed or the study in the folder is another, LockedError where another kind of sweep has it.
    """
    if retry:
        raise SweepError("--retry: a study does not repeat a failed trial, it draws another point; raise trials for more of them")
    probe = plan.make(base, "t000", "t000", None, plan.draw(base.options, 0))  # what is wrong in the config is told before anything is made
    folders.check_credentials(base.options, [probe])
    if importlib.util.find_spec("optuna") is None:
        raise SweepError("sweep(): sampler is 'tpe', but optuna is not installed: pip install optuna, or sampler='random'")
    workdir.mkdir(parents=True, exist_ok=True)
    with ExitStack() as stack:
        stack.enter_context(_held(workdir / "LOCK", fcntl.LOCK_SH, f"another sweep has {workdir}; stop it or choose another --workdir"))
        with _alone(workdir):
            study = _study(base.options, workdir)
            folders.keep_options(workdir, base.options, None)
        worker = _Worker(base, workdir, study, stack)
        records = [folders.read_record(workdir, name) for name in folders.read_options(workdir)[1]]
        yield Source(worker.next, worker.over, lambda _: plan.lengths([probe])("t000")), records, base.options.trials


class _Worker:
    """One process at work on a study. held: the lock of each trial it owns."""

    def __init__(self, base: Base, workdir: Path, study: Any, stack: ExitStack) -> None:
        self._base, self._workdir, self._study = base, workdir, study
        self._held: dict[str, IO[str]] = {}
        stack.callback(lambda: [file.close() for file in self._held.values()])

    def next(self) -> Record | None:
        """A trial that nobody works on, else a new point, else None."""
        from optuna.trial import TrialState

        with _alone(self._workdir):
            for left in self._study.get_trials(deepcopy=False, states=(TrialState.RUNNING,)):
                if record := self._take(self._trial(left)):
                    return record
            while (number := len(self._study.get_trials(deepcopy=False))) < self._base.options.trials:
                # A seed a point: a sampler made anew after a kill must not draw the points it drew before.
                self._study.sampler = _sampler(self._base.options, number)
                asked = self._study.ask({key: _distribution(d) for key, d in self._base.options.space.items()})
                try:
                    return self._take(self._trial(asked))
                except SweepError as error:  # a point that makes no config is a failed trial like any other
                    name = f"t{number:03}"
                    (self._workdir / name).mkdir(exist_ok=True)
                    self.over(scheduler.keep(self._workdir, Record(name, name, None, self._values(asked), "failed", str(error))))
            return None

    def over(self, record: Record) -> None:
        """Tell the study how a trial ended; one that was stopped stays open, for whoever goes on with it."""
        if record.status in OVER:
            self._tell(record)
        if owned := self._held.pop(record.name, None):
            owned.close()

    def _take(self, trial: Trial) -> Record | None:
        """The record of a trial, now owned; None where another has it, or where it is over and the study only had not heard."""
        if trial.name in self._held:
            return None
        (self._workdir / OWNERS).mkdir(exist_ok=True)
        file = open(self._workdir / OWNERS / trial.name, "a")  # noqa: SIM115, the open file is the lock
        try:
            fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError:
            file.close()
            return None
        record = folders.prepare(self._workdir, trial, retry=False)
        self._held[trial.name] = file
        if record.status in OVER:
            self.over(record)
            return None
        return record

    def _trial(self, drawn: Any) -> Trial:
        name = f"t{drawn.number:03}"
        return plan.make(self._base, name, name, None, self._values(drawn))

    def _values(self, drawn: Any) -> dict[str, Any]:
        """The overrides of a point."""
        space = self._base.options.space
        return {key: d.options[drawn.params[key]] if isinstance(d, Choice) else drawn.params[key] for key, d in space.items()}

    def _tell(self, record: Record) -> None:
        from optuna.trial import Trial as Asked, TrialState

        o, rows = self._base.options, folders.evaluations(self._workdir / record.name)
        found = next(t for t in self._study.get_trials(deepcopy=False) if f"t{t.number:03}" == record.name)
        if found.state.is_finished():
            return
        asked = Asked(self._study, found._trial_id)
        for step, value in folders.curve(self._workdir / record.name, o.metric).items():
            if math.isfinite(value):
                asked.report(value, step)
        value = chosen(o, rows)[1].get(o.metric, math.nan)
        if record.status == "done" and math.isfinite(value):
            self._study.tell(found.number, value)
        else:
            self._study.tell(found.number, state=TrialState.PRUNED if record.status == "pruned" else TrialState.FAIL)


def _study(options: SweepOptions, workdir: Path) -> Any:
    """The study in the folder, or a new one. Raises SweepError where it is of another metric or space."""
    import optuna
    from optuna.storages import JournalStorage
    from optuna.storages.journal import JournalFileBackend

    optuna.logging.set_verbosity(optuna.logging.ERROR)
    storage = JournalStorage(JournalFileBackend(str(workdir / JOURNAL)))
    direction = optuna.study.StudyDirection.MAXIMIZE if options.mode == "max" else optuna.study.StudyDirection.MINIMIZE
    try:
        study = optuna.create_study(storage=storage, study_name="sweep", direction=direction, load_if_exists=True)
    except ValueError as error:
        raise SweepError(f"{workdir / JOURNAL}: {error}") from None
    for key in FIXED:
        now = repr(getattr(options, key))
        if (before := study.user_attrs.get(key, now)) != now:
            raise SweepError(f"sweep(): {key} is {now}, but the study in {workdir} has {before}; use another --workdir")
        study.set_user_attr(key, now)
    return study


def _sampler(options: SweepOptions, number: int) -> Any:
    """The sampler of point `number`: a third of the points, ten at most, are random; those that others work on count as bad ones."""
    from optuna.samplers import TPESampler

    seed = zlib.crc32(f"{options.sampler_seed}/{number}".encode())
    return TPESampler(seed=seed, n_startup_trials=min(10, max(2, options.trials // 3)), multivariate=True, constant_liar=True)


def _distribution(d: Any) -> Any:
    """In Optuna's words; a choice is drawn by its place, so that its options may be anything."""
    from optuna.distributions import CategoricalDistribution, FloatDistribution, IntDistribution

    if isinstance(d, Choice):
        return CategoricalDistribution(tuple(range(len(d.options))))
    return IntDistribution(d.low, d.high, log=d.log) if isinstance(d, Integer) else FloatDistribution(d.low, d.high, log=d.log)


@contextmanager
def _alone(workdir: Path) -> Iterator[None]:
    """One worker of a study at a time."""
    with open(workdir / ".turn", "a") as file:
        fcntl.flock(file, fcntl.LOCK_EX)
        yield


@contextmanager
def _held(path: Path, how: int, words: str) -> Iterator[None]:
    from jaxvl.manifest import LockedError

    with open(path, "a") as file:
        try:
            fcntl.flock(file, how | fcntl.LOCK_NB)
        except BlockingIOError:
            raise LockedError(words) from None
        yield
