"""What a run knows of its data and its length and a method may ask for; what an evaluation needs of it is kept beside the checkpoints."""

import json
import math
from pathlib import Path
from typing import Any

import jax

from jaxvl.data.dataset import Dataset
from jaxvl.data.lists import read_json
from jaxvl.methods.method import Run

FILE = "classes.json"  # {"classes": names in the order of the labels, "parents": a_0, a_1, ...}


def of_run(recipe: Any, workdir: Path, dataset: Dataset | None) -> Run:
    """The facts of the run in `workdir`; without its data set, those that it kept.

    Raises ValueError where the classes of the data are not those the run began with: a proxy would become another class's.
    """
    file = workdir / FILE
    kept = read_json(file) if file.is_file() else None
    if file.is_file() and not (isinstance(kept, dict) and {"classes", "parents"} <= kept.keys()):
        raise ValueError(f"{file} is no list of classes and their groups; it is damaged")
    if dataset is None:
        return Run(classes=len(kept["classes"]), parents=tuple(map(tuple, kept["parents"]))) if kept else Run()
    size, options = dataset.epoch, recipe.train
    facts = Run(
        options.steps or math.ceil(options.epochs * size / options.batch_size),
        max(size // options.batch_size, 1),
        recipe.optim.warmup_steps,
    )
    if facts.steps >= 2**31:
        raise ValueError(f"config.train.epochs is {options.epochs:g}, which are {facts.steps:,} steps; steps are counted in 32 bits")
    if dataset.table is None:
        return facts
    names, parents = list(dataset.table.names), [list(a) for a in dataset.table.parents]
    regrouped = kept and parents and kept["parents"] and kept["parents"] != parents  # none where no level is asked for
    if kept and (kept["classes"] != names or regrouped):
        different = sum(a != b for a, b in zip(kept["classes"], names, strict=False)) + abs(len(kept["classes"]) - len(names))
        raise ValueError(f"the run in {workdir} began with {len(kept['classes'])} classes and the data have {len(names)}, {different} of them others "
                         f"or in other places, or their groups have changed: give it the data it began with")  # fmt: skip
    if kept is None and jax.process_index() == 0:
        partial = file.with_suffix(".partial")
        partial.write_text(json.dumps({"classes": names, "parents": parents}))
        partial.rename(file)
    return facts._replace(classes=len(names), parents=dataset.table.parents)
