"""Eight forced CPU devices, one thread pool each, and a compile cache that survives between runs."""

import importlib.metadata
import os
import pathlib
import signal

ROOT = pathlib.Path(__file__).resolve().parent.parent
os.environ.setdefault("JAX_PLATFORMS", "cpu")
os.environ["XLA_FLAGS"] = os.environ.get("XLA_FLAGS", "") + " --xla_force_host_platform_device_count=8"
if "xla_backend_optimization_level" not in os.environ["XLA_FLAGS"]:
    # The suite compiles far longer than it computes: with these, a third less CPU time.
    os.environ["XLA_FLAGS"] += " --xla_backend_optimization_level=0 --xla_cpu_parallel_codegen_split_count=1"
    if importlib.metadata.version("jax").startswith("0.10."):  # later ones end the process at a flag they do not know
        os.environ["XLA_FLAGS"] += " --xla_cpu_use_fusion_emitters=false"
os.environ.setdefault("NPROC", "64")  # see hosts.join
os.environ.setdefault("JAX_COMPILATION_CACHE_DIR", str(ROOT / ".cache" / "jax"))
os.environ.setdefault("JAX_PERSISTENT_CACHE_MIN_COMPILE_TIME_SECS", "0.2")
os.environ.setdefault("JAXVL_CACHE", str(ROOT / ".cache" / "jaxvl"))
os.environ.setdefault("TOKENIZERS_PARALLELISM", "false")
# A suite that is started in the background ignores Ctrl-C, and so would the commands whose Ctrl-C is tested.
signal.signal(signal.SIGINT, signal.default_int_handler)
