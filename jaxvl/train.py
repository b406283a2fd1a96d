"""The run, read top to bottom: mesh, data, method, optimiser, shardings, restore, step, loop.

The order inside the loop is what makes a resumed run equal to one that was never stopped: step, then evaluate, then save.
An evaluation comes before the save of the same step, so that a run resumed there has its numbers and does not repeat it.
"""

import json
import zlib
from contextlib import ExitStack, closing
from pathlib import Path
from typing import Any

import jax
import numpy as np
from jax.experimental import multihost_utils
from ml_collections import ConfigDict

from jaxvl import assembly, checkpoint, compiled, config as configs, evals, hosts, phases, report, seal
from jaxvl.data import lexicon
from jaxvl.data.dataset import Dataset, open_data
from jaxvl.data.stream import train_batches
from jaxvl.interop import initial
from jaxvl.mesh import check_batch, make_mesh, path_str, place, process_rows
from jaxvl.methods.method import for_faces
from jaxvl.optim import OptimOptions, frozen
from jaxvl.plan import record
from jaxvl.progress import say
from jaxvl.report.metrics import encode, read_whole, write_atomic
from jaxvl.rollback import Skipped, go_back
from jaxvl.state import samples_seen
from jaxvl.stopping import end_with_parent, stopping
from jaxvl.workdir import open_workdir

# What may differ between two starts of one run; a change of anything else is pointed out.
MAY_CHANGE = ("mesh.", "checkpoint.", "log.", "evals.", "train.steps", "train.epochs", "data.workers", "data.threads")


def train(config: ConfigDict, workdir: Path, *, age: float = 0.0) -> int:
    """Train the run in `workdir` from its newest whole checkpoint, or from the start, to its last step.

    age: seconds this process has spent on the run before, which count as its start.
    Returns 0, or the status of stopping.py where it was told to stop. Raises ValueError for what is wrong in the config, before any compile.
    """
    recipe = configs.read(config)
    end_with_parent()
    hosts.join()
    mesh = make_mesh(recipe.mesh)
    check_batch(recipe.train.batch_size, mesh, recipe.train.accumulate)
    with (
        jax.set_mesh(mesh),
        open_workdir(workdir, recipe.checkpoint) as (saver, accept),
        report.open_log(recipe.log, workdir, jax.process_index(), age) as log,
    ):
        dataset = open_data(recipe.data)
        _same_everywhere(dataset)
        if dataset.epoch < recipe.train.batch_size:
            say(f"note: config.train.batch_size is {recipe.train.batch_size:,} and the data have {dataset.epoch:,} samples: a batch has "
                f"samples more than once, which a contrastive loss takes for negatives of themselves")  # fmt: skip
        evals.check(recipe.evals, recipe.data)
        parts = assembly.build(recipe, workdir, dataset)
        batch_size = recipe.train.batch_size
        steps = parts.run.steps
        phases.check(parts.method, parts.recipe.optim, steps)

        plan = assembly.program(parts, mesh, steps)
        fresh = not checkpoint.whole_steps(workdir / "checkpoints")
        start = (
            initial.plan(parts.recipe, plan.state.params, parts.tokenizer.offset if parts.tokenizer else 0, plan.state.memory)
            if fresh
            else {}
        )
        restored = saver.restore(plan.state)
        if restored:
            lexicon.same(parts.tokenizer, restored.meta, workdir)
            phases.check_resumed(parts.method, restored.state.memory, restored.step, steps)
        rows = process_rows(mesh, batch_size)
        compiled.keep(workdir)
        if fresh:
            _tell_random(start, plan.state.params, parts.recipe.optim)
        with log.pause("compile"):
            train_step = jax.jit(plan.step, donate_argnums=0, out_shardings=plan.out_shardings).lower(plan.state, plan.batch).compile()

        with stopping() as told, ExitStack() as stack:
            state = (
                restored.state
                if restored
                else initial.fill(start, jax.jit(plan.init, out_shardings=plan.out_shardings[0])(jax.random.key(recipe.seed)))
            )
            step = restored.step if restored else 0
            # From here on the run is what its config says; before, a start that is refused has changed nothing.
            accept()
            _keep_config(config, workdir)
            record.save(workdir, parts, plan, train_step, mesh, steps)
            log.describe(
                config=configs.to_json(config, indent=2),
                mesh=", ".join(f"{k} {v}" for k, v in mesh.shape.items()),
                devices=f"{jax.device_count()} x {jax.devices()[0].device_kind}",
            )
            say(
                f"{'continuing at' if restored else 'starting at'} step {step} of {steps}, {sum(p.size for p in jax.tree.leaves(state.params)):,} parameters"
            )
            log.start(step=step, steps=steps, batch_size=batch_size, samples_per_epoch=dataset.epoch,
                      flops_per_sample=3 * parts.method.flops(parts.spec), chips=jax.device_count(), device_kind=jax.devices()[0].device_kind, processes=jax.process_count(), board=hosts.board())  # fmt: skip
            log.bad(dataset.bad)
            batches = stack.enter_context(closing(train_batches(
                dataset, parts.tokenizer, seed=recipe.seed, start=samples_seen(state.position), batch_size=batch_size, rows=rows,
                views=recipe.augment.views, sides=recipe.augment.hflip == "unsided",
            )))  # fmt: skip

            sealed = seal.stamp(workdir)
            skipped = Skipped(recipe.train.rollback, restored.meta.get("skipped", []) if restored else [])
            tries: dict[int, int] = {}

            def save(*, block: bool = False) -> None:
                meta = {"config": configs.to_json(config), "position": {"seed": recipe.seed, "samples": samples_seen(state.position)},
                        "skipped": skipped.note(), "files": sealed, **lexicon.stamp(parts.tokenizer)}  # fmt: skip
                with log.pause("checkpoint"):
                    saver.save(step, state, meta, values, block=block)

            while step < steps or skipped.too_many:
                if skipped.too_many:
                    with log.pause("rollback"):
                        step, state, _ = go_back(saver, plan.state, state, skipped, step, tries)
                    log.back(step)
                    skipped = Skipped(recipe.train.rollback, [0, int(state.skipped)])
                with log.wait("data"):
                    batch = next(batches)
                with log.wait("transfer"):
                    arrays = place(batch.arrays, mesh)
                state, metrics = train_step(state, arrays)
                step += 1
                log.fed(step, rows[0], batch.ids)
                log.step(step, metrics, arrays)
                log.bad(batch.bad)
                skipped.add(metrics["skipped"])
                if skipped.too_many:
                    continue
                values: dict[str, float] = {}
                due = {k: e for k, e in recipe.evals.items() if step == steps or (e.every and step % e.every == 0)}
                if due:
                    with log.pause("eval"):
                        values, galleries = evals.run(
                            due,
                            parts.method,
                            for_faces(parts.method, state.params, state.memory),
                            parts.tokenizer,
                            recipe.data,
                            recipe.augment,
                        )
                    log.write(step, values, galleries)
                if status := told():
                    save(block=True)
                    if recipe.log.html and jax.process_index() == 0:
                        report.write_report(workdir)
                    say(f"terminated: step {step} is saved; the same command continues there")
                    return status
                if step == steps or step % recipe.checkpoint.every == 0:
                    skipped.settle()
                    # Amid skipped steps nothing is learnt, and what is kept of a few checkpoints should be good ones.
                    if skipped.row == 0 or (step == steps and not skipped.too_many):
                        save(block=step == steps)
            log.finish()
    return 0


def evaluate(workdir: Path, overrides: list[str], *, step: int | None = None, ema: bool = False) -> int:
    """Evaluate a checkpoint of the run in `workdir` with the code the run itself uses; prints the table and writes eval.json."""
    recipe = assembly.read_recipe(workdir, overrides)
    hosts.join()
    mesh = make_mesh(recipe.mesh)
    compiled.keep(workdir)
    with jax.set_mesh(mesh):
        parts = assembly.build(recipe, workdir, None)
        found = assembly.read_params(parts, workdir, mesh, step=step, ema=ema)
        values, _ = evals.run(recipe.evals, parts.method, found.state, parts.tokenizer, recipe.data, recipe.augment)
    if jax.process_index() == 0:
        write_atomic(workdir / "eval.json", encode({"step": found.step, "ema": ema, **values}, indent=2))
        report.print_values(values)
    return 0


def _tell_random(start: dict[str, initial.Leaf], params: Any, optim: OptimOptions) -> None:
    """Name what stands still at random numbers, since no file gives it others: what trains beside it learns to live with noise."""
    still = {path_str(path): flag is True for path, flag in jax.tree_util.tree_leaves_with_path(frozen(optim, params))}
    random = sorted({path.partition("/")[0] for path, frozen in still.items() if frozen and path not in start})
    if random:
        say(
            f"note: config.optim lets {', '.join(random)} stand still, in whole or in part, at the random numbers of the start; "
            f"config.init gives them no others"
        )


def _same_everywhere(dataset: Dataset) -> None:
    """Raises ValueError where a process sees other samples than process 0: the global batches would be none that anyone meant."""
    if jax.process_count() == 1:
        return
    names = [Path(shard).name for source in dataset.sources for shard in source.shards]
    mine = zlib.crc32(dataset.counts.tobytes() + repr(names).encode())
    digests = np.atleast_1d(multihost_utils.process_allgather(np.uint32(mine)))
    if others := np.flatnonzero(digests != digests[0]).tolist():
        raise ValueError(f"processes {others} see other samples in config.data.source than process 0, for one where only some hosts have recorded "
                         f"bad samples; give all hosts one folder as config.data.indexes, and the same shards")  # fmt: skip


def _keep_config(config: ConfigDict, workdir: Path) -> None:
    """Save the whole config with the run; where the run had another, say what differs and may make it another run."""
    if jax.process_index() != 0:
        return
    file = workdir / "config.json"
    if configs.to_json(config) != config.to_json_best_effort():
        say(
            "note: the config has passwords or signatures in URLs, which are not kept; what reads the run later has to be given those URLs again"
        )
    if old := read_whole(file, lambda found: configs.flat(dict(found)), {}):
        new = configs.flat(json.loads(configs.to_json(config)))
        for name in sorted(old.keys() | new.keys()):
            if old.get(name) != new.get(name) and not name.startswith(MAY_CHANGE):
                say(f"config.{name} was {old.get(name)!r} when this run began and is {new.get(name)!r} now")
    write_atomic(file, configs.to_json(config, indent=2))  # others may be reading it, and a full disk must not cut it short
