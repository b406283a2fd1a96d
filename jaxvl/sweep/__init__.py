"""Many runs of one recipe: what a config file's `sweep()` says, and the distributions it may name. Light to import."""

from jaxvl.sweep.options import Choice, Integer, SweepOptions, Uniform

__all__ = ["Choice", "Integer", "SweepOptions", "Uniform"]
