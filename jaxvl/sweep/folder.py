"""The folder of a sweep: sweep.json, and a run directory a trial with trial.json beside the run's own files.

A trial's status is what trial.json says, written by the sweep alone: "waiting", "running", "stopped" (unfinished, goes on
when the sweep does), "done", "pruned" or "failed".
"""

import json
from collections.abc import Mapping, Sequence
from functools import lru_cache
from pathlib import Path
from typing import IO, Any, NamedTuple

from ml_collections import ConfigDict

from jaxvl import manifest
from jaxvl.config import ConfigError, complete, flat
from jaxvl.report.metrics import METRICS, decode, write_atomic
from jaxvl.secrets import public
from jaxvl.sweep.options import Choice, Integer, SweepError, SweepOptions, Uniform
from jaxvl.sweep.plan import Trial

STATUSES = ("done", "pruned", "failed", "running", "stopped", "waiting")
OVER = ("done", "pruned", "failed")
LOG = "train.log"
# A run made with another value of these is still the run the sweep means.
MAY_CHANGE = ("mesh.", "checkpoint.", "log.", "data.workers", "data.threads")
KINDS: dict[str, type] = {kind.__name__: kind for kind in (Uniform, Integer, Choice)}


class Record(NamedTuple):
    """trial.json. reason: of a failure or an early end. seconds: of its processes so far. job: see `scheduler.Process`."""

    name: str
    group: str
    seed: int | None
    overrides: dict[str, Any]
    status: str = "waiting"
    reason: str = ""
    seconds: float = 0.0
    job: str = ""


def keep_options(folder: Path, options: SweepOptions, names: Sequence[str] | None) -> None:
    """Write sweep.json: what the table of results needs to know. names: of the trials in order, None where a study makes them as it goes."""
    write_atomic(folder / "sweep.json", _options_text(options, names))


def _options_text(options: SweepOptions, names: Sequence[str] | None) -> str:
    body = options._asdict() | {"space": {k: [type(d).__name__, *d] for k, d in options.space.items()}}
    return _without_credentials(json.dumps({"options": body, "trials": names}, indent=1, default=str), "sweep()")


def check_credentials(options: SweepOptions, trials: Sequence[Trial]) -> None:
    """Raises SweepError where a sweep of these trials would have to keep credentials; before there is a folder for it."""
    _options_text(options, None)
    for trial in trials:
        _config_text(trial)


def _config_text(trial: Trial) -> str:
    return _without_credentials(trial.config.to_json_best_effort(indent=2), trial.name)


def _without_credentials(text: str, name: str) -> str:
    """`text`, from which trials are started. Raises SweepError where it has credentials, which must not be kept, and trials need."""
    if public(text) != text:
        raise SweepError(
            f"{name}: a URL of the config has a password or a signature, which would be kept in every trial's folder; "
            f"give credentials to the store's client instead, such as AWS_PROFILE or GOOGLE_APPLICATION_CREDENTIALS"
        )
    return text


def read_options(folder: Path) -> tuple[SweepOptions, list[str]]:
    """Options and names of the trials of the sweep in `folder`. Raises SweepError where there is none."""
    path = folder / "sweep.json"
    if not path.is_file():
        raise SweepError(f"{folder} is no sweep: it has no sweep.json")
    try:
        body = json.loads(path.read_text())
        plain = body["options"]
        space = {k: KINDS[kind](*rest) for k, (kind, *rest) in plain["space"].items()}
        names = body["trials"] if body["trials"] is not None else sorted(path.parent.name for path in folder.glob("*/trial.json"))
        return SweepOptions(**plain | {"space": space, "also": tuple(plain["also"]), "seeds": tuple(plain["seeds"])}), names
    except (ValueError, KeyError, TypeError, AttributeError, RecursionError) as error:
        raise SweepError(f"{path} is damaged: {type(error).__name__}: {error}; start the sweep in a new folder") from None


def read_record(folder: Path, name: str) -> Record:
    """The record of a trial. Raises SweepError where it cannot be read."""
    path = folder / name / "trial.json"
    try:
        return Record(**json.loads(path.read_text()))
    except (OSError, TypeError, ValueError, RecursionError) as error:
        raise SweepError(f"{path}: {error}; it belongs to trial {name!r}, remove the folder to run it anew") from None


def write_record(folder: Path, record: Record) -> None:
    """Keep the record in the folder of its trial."""
    write_atomic(folder / record.name / "trial.json", json.dumps(record._asdict(), indent=1))


def prepare(folder: Path, trial: Trial, *, retry: bool) -> Record:
    """The `begun` record of a trial, kept; its folder and config.json are made where it has not begun."""
    record, kept = begun(folder, trial, retry=retry), _config_text(trial)
    own = folder / trial.name
    own.mkdir(exist_ok=True)
    if record.status not in OVER:
        write_atomic(own / "config.json", kept)
    write_record(folder, record)
    return record


def begun(folder: Path, trial: Trial, *, retry: bool) -> Record:
    """The record of a trial that may have begun; changes nothing.

    retry: a failed trial is run again. Raises SweepError where the folder holds a run of another config.
    """
    own = folder / trial.name
    record = Record(trial.name, trial.group, trial.seed, json.loads(json.dumps(trial.overrides)))
    if (own / "trial.json").is_file():
        old = read_record(folder, trial.name)
        if old.status != "waiting":
            _same(own, trial)
            record = record._replace(status=old.status, reason=old.reason, seconds=old.seconds, job=old.job)
    elif own.exists():
        raise SweepError(f"{own} exists and is no trial of a sweep; use another --workdir")
    if record.status == "running" or (record.status == "failed" and retry):
        record = record._replace(status="stopped")
    return record


def lock(folder: Path) -> IO[str]:
    """Keep other sweeps out of `folder` until the returned file is closed. Raises LockedError while another has it."""
    folder.mkdir(parents=True, exist_ok=True)
    return manifest.lock(folder)


def writer(run: Path) -> str:
    """What is writing to a run, in words, or ""."""
    checkpoints = run / "checkpoints"
    try:
        if checkpoints.is_dir():
            manifest.lock(checkpoints).close()
    except manifest.LockedError as error:
        return str(error)
    return ""


def curve(run: Path, metric: str) -> dict[int, float]:
    """step -> value of one evaluation metric of a run; empty before its first evaluation."""
    return {row["step"]: float(row[metric]) for row in evaluations(run) if metric in row}


def evaluations(run: Path) -> list[dict[str, Any]]:
    """The lines of metrics.jsonl that evaluations wrote. Reads a run that is writing: a torn last line is left out."""
    path = run / METRICS
    if not path.is_file():
        return []
    now = path.stat()
    return _evaluations(path, now.st_mtime_ns, now.st_size)


@lru_cache(maxsize=4096)
def _evaluations(path: Path, changed: int, size: int) -> list[dict[str, Any]]:
    """Read once for each state of the file: pruning compares with every other trial, most of them over."""
    del changed
    text = path.read_bytes()[:size].decode(errors="replace")
    lines = text[: text.rfind("\n") + 1].splitlines()
    return [row for row in map(decode, (line for line in lines if '"samples"' not in line)) if "samples" not in row]


def known_metrics(rows: Sequence[Mapping[str, Any]]) -> list[str]:
    """The names that evaluations have given."""
    return sorted({name for row in rows for name in row if name != "step"})


def _same(own: Path, trial: Trial) -> None:
    """Raises SweepError where the run in `own` was made with another config than the trial's, naming the first key.

    Keys that this version of jaxvl has and the one that ran had not count with their defaults.
    """
    try:
        plain = json.loads((own / "config.json").read_text())
    except (OSError, ValueError):  # killed while it was written; the trial's own takes its place
        return
    if not isinstance(plain, dict):
        raise SweepError(f"{own / 'config.json'} is no config; remove the folder to run the trial anew")
    try:
        old = flat(json.loads(complete(ConfigDict(plain)).to_json_best_effort()))
    except ConfigError as error:
        raise SweepError(
            f"{own} was run with a config that this version does not read: {error}. Use another --workdir, or remove this folder"
        ) from None
    new = flat(json.loads(trial.config.to_json_best_effort()))
    for key in sorted(old.keys() | new.keys()):
        if old.get(key) != new.get(key) and not key.startswith(MAY_CHANGE):
            raise SweepError(
                f"{own} was run with config.{key}={old.get(key)!r}; the sweep now says {new.get(key)!r}. "
                f"Use another --workdir, or remove this folder to run the trial anew"
            )
