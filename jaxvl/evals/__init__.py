"""Evaluations by kind, and the one way to run them, in a run and on its own. A kind's module is imported when it is asked for."""

import importlib
from collections.abc import Mapping
from typing import Any, NamedTuple


class Kind(NamedTuple):
    """A module that defines `evaluate(name, options, model)` and a tuple of options. needs: the face it asks of a method."""

    module: str
    options_name: str
    needs: str = "embed_image"

    def options(self) -> type:
        """The NamedTuple whose fields are the keys of an `evals` entry of this kind."""
        return getattr(importlib.import_module(self.module), self.options_name)

    def open_checked(self, options: Any, data: Any) -> Any:
        """The data set to evaluate on. Raises ValueError for options or data that cannot be evaluated."""
        return importlib.import_module(self.module).open_checked(options, data)

    def evaluate(self, name: str, options: Any, model: Any) -> tuple[dict[str, float], list]:
        """Numbers by name, and galleries and tables for the report. Raises ValueError for options or data that cannot be evaluated."""
        return importlib.import_module(self.module).evaluate(name, options, model)


EVALS = {
    "composed": Kind("jaxvl.evals.composed", "ComposedOptions", needs="compose"),
    "retrieval": Kind("jaxvl.evals.retrieval", "RetrievalOptions", needs="embed_text"),
    "rerank": Kind("jaxvl.evals.rerank", "RerankOptions", needs="score_pair"),
    "lexical": Kind("jaxvl.evals.lexical", "LexicalOptions", needs="embed_words"),
    "patchdis": Kind("jaxvl.evals.patches", "PatchdisOptions", needs="embed_patches"),
    "zeroshot": Kind("jaxvl.evals.zeroshot", "ZeroshotOptions", needs="embed_text"),
    "metric_learning": Kind("jaxvl.evals.class_retrieval", "MetricLearningOptions"),
}


def check(evals: Mapping[str, Any], data: Any) -> None:
    """Opens the data set of every evaluation, so that what is wrong with one is known before training and not hours into it."""
    for name, options in evals.items():
        try:
            EVALS[options.kind].open_checked(options, data)
        except (ValueError, OSError) as error:
            raise ValueError(f"evals.{name}: {error}") from error


def suits(evals: Mapping[str, Any], name: str, method: Any) -> None:
    """Raises ValueError where an evaluation asks for what the method of this name cannot do."""
    for key, options in evals.items():
        if getattr(method, EVALS[options.kind].needs) is None:
            raise ValueError(
                f"config.evals.{key}.kind is {options.kind!r}, which needs a method with {EVALS[options.kind].needs}; {name} has none"
            )


def run(evals: Mapping[str, Any], method: Any, params: Any, tokenizer: Any, data: Any, augment: Any) -> tuple[dict[str, float], list]:
    """Runs evaluations, given as {name: options}, on `params` over the mesh of the context (`jax.set_mesh`).

    data: DataOptions of the training, from which image size and the like are taken; augment: AugmentOptions, for the pixels' mean and
    spread. Returns the numbers as {"name/i2t/r@1": ...} and galleries and tables (gallery.py) for the report; every process gets the same.
    """
    import jax

    from jaxvl.evals.embed import Model

    model = Model(method, params, tokenizer, data, augment, jax.sharding.get_mesh())
    values: dict[str, float] = {}
    galleries: list = []
    for name, options in evals.items():
        try:
            numbers, shown = EVALS[options.kind].evaluate(name, options, model)
        except ValueError as error:
            raise ValueError(f"evals.{name}: {error}") from error
        values |= {f"{name}/{key}": value for key, value in numbers.items()}
        galleries += shown
    return values, galleries
