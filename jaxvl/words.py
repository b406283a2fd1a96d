"""`jaxvl words`: a page that shows what the model of a run sees in held-out images, word by word."""

from pathlib import Path

import jax

from jaxvl import assembly, hosts
from jaxvl.evals.embed import Model
from jaxvl.evals.explain import explain
from jaxvl.evals.lexical import LexicalOptions
from jaxvl.mesh import make_mesh
from jaxvl.report.words import write_words


def run(
    workdir: Path, overrides: list[str], *, images: int = 60, searched: int = 12, each: int = 5, step: int | None = None, ema: bool = False
) -> Path:
    """Write words.html and words.json of the run in `workdir`, on the set of its evaluation of kind "lexical"; returns the page.

    images, searched, each: see `explain`. Raises ValueError where the run has no such evaluation or no words.
    """
    recipe = assembly.read_recipe(workdir, overrides)
    chosen = next((options for options in recipe.evals.values() if isinstance(options, LexicalOptions)), None)
    if chosen is None:
        kinds = ", ".join(f"{name}: {options.kind}" for name, options in recipe.evals.items()) or "none"
        raise ValueError(f"the run has no evaluation of kind 'lexical' (it has {kinds}), whose images would be shown")
    hosts.join()
    mesh = make_mesh(recipe.mesh)
    with jax.set_mesh(mesh):
        parts = assembly.build(recipe, workdir, None)
        found = assembly.read_params(parts, workdir, mesh, step=step, ema=ema)
        model = Model(parts.method, found.state, parts.tokenizer, recipe.data, recipe.augment, mesh)
        shown = explain(chosen, model, images=images, searched=searched, each=each)
    page = workdir / "words.html"
    return write_words(workdir, workdir.resolve().name, found.step, shown) if jax.process_index() == 0 else page
