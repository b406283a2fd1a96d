"""One embedding function as an ONNX file, through jax2onnx, and the file run in onnxruntime."""

import contextlib
import importlib.util
import io
import logging
from collections.abc import Callable
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from jax.extend.core import jaxpr_as_fun

PACKAGES = ("jax2onnx", "onnxruntime")
LARGEST = 2_000_000_000  # bytes of parameters; an ONNX file is one protocol buffer, which ends at 2 GiB


def check_installed() -> None:
    """Raises ValueError where the packages of the `onnx` extra are missing."""
    if missing := [name for name in PACKAGES if importlib.util.find_spec(name) is None]:
        raise ValueError(
            f"{' and '.join(missing)} not installed. jax2onnx asks for an older Orbax than training uses, so give it an environment of its own: "
            "python3 -m venv onnx-env && onnx-env/bin/pip install '.[onnx]' && onnx-env/bin/jaxvl export RUN --format onnx --out OUT"
        )


def write(path: Path, face: Callable[[Any, jax.Array], jax.Array], params: Any, inputs: np.ndarray) -> Callable[[np.ndarray], np.ndarray]:
    """Writes face(params, .) with `params` inside, open in the leading axis of `inputs`; returns the file as onnxruntime runs it.

    The input is named "input", the output "embedding". Raises ValueError for parameters that do not fit into one file.
    """
    import jax2onnx
    import onnxruntime

    size = sum(x.nbytes for x in jax.tree.leaves(params))
    if size > LARGEST:
        raise ValueError(
            f"{path.name} would hold {size / 1e9:.1f} GB of parameters, and an ONNX file ends at 2 GB: use --format stablehlo or hf"
        )
    (batch,) = jax.export.symbolic_shape("batch")
    spec = jax.ShapeDtypeStruct((batch, *inputs.shape[1:]), inputs.dtype)
    weights = jax.tree.map(jnp.asarray, params)
    # jax2onnx replaces Flax layers by its own while it traces, which fails inside nn.scan; a program traced before is plain primitives.
    program = jaxpr_as_fun(jax.make_jaxpr(lambda x: face(weights, x))(spec))
    logging.getLogger("onnx_ir").setLevel(logging.ERROR)  # it warns of every shape it leaves for onnxruntime to infer
    with contextlib.redirect_stdout(io.StringIO()):
        jax2onnx.to_onnx(
            lambda x: program(x)[0], [spec], input_names=["input"], output_names=["embedding"], return_mode="file", output_path=str(path)
        )
    options = onnxruntime.SessionOptions()
    options.log_severity_level = 3  # its warnings are of constants it drops
    session = onnxruntime.InferenceSession(str(path), options, providers=["CPUExecutionProvider"])
    return lambda x: session.run(["embedding"], {"input": x})[0]
