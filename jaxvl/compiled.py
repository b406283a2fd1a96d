"""Compiled programs are kept with a run, so that a restart, after a kill or on another day, does not compile what has not changed."""

from pathlib import Path

FOLDER = ".compiled"  # in the workdir
VARIABLE = "JAX_COMPILATION_CACHE_DIR"


def keep(workdir: Path) -> None:
    """From now on programs are read from and written to `workdir`/.compiled; where JAX was told of a folder, to that one.

    JAX names an entry by the program, the compiler's version and options and the devices, and takes back what it does not know.
    """
    import jax

    if not jax.config.jax_compilation_cache_dir:  # type: ignore[attr-defined]
        jax.config.update("jax_compilation_cache_dir", str(Path(workdir).resolve() / FOLDER))
