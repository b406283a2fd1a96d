"""Trials as Slurm jobs, by submitit: one job a trial, requeued where it is preempted or runs out of time, found again by a later sweep.

The sweep itself may run anywhere that sees the folder, for one on a login node; it submits as many jobs as it has workers.
"""

import time
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from jaxvl.sweep.folder import LOG
from jaxvl.sweep.local import Command
from jaxvl.sweep.options import SweepError
from jaxvl.sweep.scheduler import Launch
from jaxvl.sweep.task import Task

STOP = "stop"  # file in a run directory that asks its job to end
JOBS = ".slurm"  # submitit's own files
LOOK = 30.0  # seconds between two questions to Slurm about a job that gave no result


def launcher(command: Command, workdir: Path, env: Mapping[str, str], text: str) -> Launch:
    """Submits trials with the parameters of `text`: "partition=gpu,gpus_per_node=8,timeout_min=600", names as submitit has them.

    cluster=local runs the same jobs as processes of this machine, to try the parameters. Raises SweepError where submitit or Slurm is missing, or for a parameter submitit does not know.
    """
    try:
        import submitit
    except ImportError:
        raise SweepError("--slurm: submitit is not installed: pip install submitit") from None
    parameters = parse(text)
    cluster = parameters.pop("cluster", "slurm")
    try:
        executor = submitit.AutoExecutor(folder=(workdir / JOBS / "%j").resolve(), cluster=cluster)
        executor.update_parameters(**{"timeout_min": 24 * 60, "name": f"jaxvl-{workdir.resolve().name}", **parameters})
    except (NameError, RuntimeError, TypeError, ValueError) as error:
        raise SweepError(f"--slurm={text}: {error}") from None

    def launch(run: Path, slot: int, job: str) -> SlurmProcess:
        del slot
        if job and not (old := _job(workdir, cluster, job)).done(force_check=True) and old.state != "UNKNOWN":
            return SlurmProcess(run, old)
        own = run.resolve()
        (run / STOP).unlink(missing_ok=True)
        return SlurmProcess(run, executor.submit(Task(command(own), dict(env), str(own / LOG), str(own / STOP))))

    return launch


def parse(text: str) -> dict[str, Any]:
    """ "a=1,b=x" as {"a": 1, "b": "x"}. Raises SweepError for anything else."""
    out: dict[str, Any] = {}
    for item in filter(None, text.split(",")):
        key, equals, value = item.partition("=")
        if not equals or not key.isidentifier():
            raise SweepError(f"--slurm={text}: {item!r} is no KEY=VALUE; write partition=gpu,gpus_per_node=8,timeout_min=600")
        key = (
            f"slurm_{key}"
            if key in ("partition", "account", "qos", "constraint", "time", "array_parallelism", "comment", "exclude", "nodelist")
            else key
        )
        out[key] = int(value) if value.isdigit() else value
    return out


class SlurmProcess:
    """A job as the scheduler sees it, see `scheduler.Process`. job: its id."""

    def __init__(self, run: Path, job: Any) -> None:
        self.job, self._run, self._job, self._looked = job.job_id, run, job, time.monotonic()

    def poll(self) -> int | str | None:
        """The exit status of the trial's command, or what Slurm says where the job left none."""
        if not self._job.paths.result_pickle.exists():
            if time.monotonic() - self._looked < LOOK:
                return None
            self._looked = time.monotonic()
            if not self._job.done(force_check=True):
                return None
        try:
            return self._job.task(0).result() if self._job.num_tasks > 1 else self._job.result()
        except Exception as error:  # submitit's, whose first line says what happened
            return f"job {self.job} {self._job.state}: {str(error).splitlines()[0][:200]}"

    def end(self, kill: bool) -> None:
        """Through a file, which any job sees wherever it runs; one that waits in the queue is taken out of it."""
        (self._run / STOP).touch()
        if kill or self._job.state == "PENDING":
            self._job.cancel(check=False)


def _job(workdir: Path, cluster: str, job: str) -> Any:
    """A job submitted by an earlier sweep."""
    folder = (workdir / JOBS / "%j").resolve()
    if cluster == "slurm":
        from submitit.slurm.slurm import SlurmJob

        return SlurmJob(folder, job)
    from submitit.local.local import LocalJob

    return LocalJob(folder, job)
