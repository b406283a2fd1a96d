"""What an error means for the person who meets it: one sentence for what a user can cause and mend, nothing for a fault of the program."""

import os
import re
import traceback

# What XLA says of a lost peer or device, at times in a ValueError: nothing that a person can mend in a config, and a restart may.
RUNTIME = re.compile(r"(UNKNOWN|UNAVAILABLE|INTERNAL|ABORTED|CANCELLED|DEADLINE_EXCEEDED|FAILED_PRECONDITION|DATA_LOSS): ")
MEMORY = re.compile(r"RESOURCE_EXHAUSTED|[Oo]ut of memory")
# Clients of stores, hubs, trackers and schedulers, whose errors are about what they were asked for: a login, a name, a network.
CLIENTS = {
    "aiobotocore", "aiohttp", "botocore", "fsspec", "gcsfs", "google", "httpcore", "httpx", "huggingface_hub", "optuna", "requests", "s3fs", "submitit",
    "tokenizers", "urllib3", "wandb",
}  # fmt: skip
# Readers of files, whose errors are about bytes.
READERS = {"_csv", "lzma", "_lzma", "PIL", "safetensors", "safetensors_rust", "struct", "tarfile", "tensorflow_datasets", "zipfile", "zlib"}
PACKAGES = {"libtpu": "'jax[tpu]'", "sklearn": "scikit-learn", "faiss": "faiss-cpu", "seismic": "pyseismic-lsr"}  # by what is imported


def lost(error: BaseException) -> bool:
    """Whether a peer or a device was lost, which a restart may mend."""
    return RUNTIME.match(str(error)) is not None


def sentence(error: BaseException) -> str:
    """What was wrong and what would be right; "" for an error that only a change of the program can mend."""
    text, name = str(error).strip(), type(error).__name__
    home = type(error).__module__.partition(".")[0]
    if isinstance(error, ModuleNotFoundError):
        package = (error.name or "").partition(".")[0]
        return (
            f"the package {package} is not installed: pip install {PACKAGES.get(package, package)}" if package not in ("", "jaxvl") else ""
        )
    if home in CLIENTS or home in READERS:
        return f"{text or 'no reason was given'} ({home} {name})"
    if isinstance(error, (ValueError, OSError)):
        return text or f"{name} without a reason"
    if isinstance(error, ImportError):  # of an optional package that an old or broken installation lacks a part of
        return text
    if name == "BrokenProcessPool":
        return "a worker process ended in the middle of its work, as one does that the system ends for its memory: use a host with more, or fewer cores (taskset)"
    if isinstance(error, MemoryError):
        return f"this host has too little memory ({text or 'an allocation failed'}): use a smaller batch, fewer workers or a larger host"
    if isinstance(error, OverflowError):
        return f"a number is too large to count with: {text}"
    if isinstance(error, RecursionError):
        return "a file or a value is nested too deeply to be read"
    if isinstance(error, EOFError):
        return f"a file ends too early ({text or 'no more bytes'})"
    if isinstance(error, RuntimeError) and MEMORY.search(text):
        first = text.splitlines()[0]
        return f"a device has too little memory: {first}; lower train.batch_size, raise train.accumulate or split more (`jaxvl plan` tells what a step needs)"
    if _no_backend(error):
        asked = text.splitlines()[0] if text else f"JAX_PLATFORMS is {os.environ.get('JAX_PLATFORMS')!r}, and there is none"
        return (
            f"JAX cannot use the device that was asked for: {asked}; unset JAX_PLATFORMS, or install jax for it (pip install 'jax[cuda12]')"
        )
    return ""


def _no_backend(error: BaseException) -> bool:
    """Whether JAX has started no backend, of which it says nothing where JAX_PLATFORMS names one that this installation has no plugin for."""
    if isinstance(error, RuntimeError):
        return "initialize backend" in str(error)
    frames = traceback.extract_tb(error.__traceback__)
    return isinstance(error, AssertionError) and bool(frames) and frames[-1].filename.endswith("jax/_src/xla_bridge.py")
