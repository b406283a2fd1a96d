"""A checkpoint of several processes is one checkpoint."""

import json
import subprocess
import sys

import jax
import jax.numpy as jnp
import numpy as np
from running import environment, peers

from jaxvl.checkpoint import restore

TWO_PROCESSES = """
import json, logging, pathlib, sys
import jax, numpy as np
from jax.experimental import multihost_utils
from jax.sharding import NamedSharding, PartitionSpec as P
from jaxvl.checkpoint import CheckpointOptions, open_saver
from jaxvl.manifest import whole_steps
from jaxvl import hosts
from jaxvl.mesh import MeshOptions, make_mesh

hosts.join()
folder, said = pathlib.Path(sys.argv[1]), {}
lines = []
logging.getLogger("jaxvl").addHandler(type("Keep", (logging.Handler,), {"emit": lambda self, record: lines.append(record.getMessage())})())
mesh = make_mesh(MeshOptions(data=1, fsdp=-1))
spread = lambda x, spec: jax.make_array_from_callback(x.shape, NamedSharding(mesh, spec), lambda index: x[index])
state = {"w": spread(np.arange(32, dtype=np.float32).reshape(8, 4), P("fsdp")), "r": spread(np.arange(6, dtype=np.int32), P())}
abstract = jax.tree.map(lambda x: jax.ShapeDtypeStruct(x.shape, x.dtype, sharding=x.sharding), state)
with open_saver(folder, CheckpointOptions()) as saver:
    for step in (1, 2):
        saver.save(step, state, {"step": step})
    saver.wait()
    said["whole"] = whole_steps(folder)
    try:
        open_saver(folder, CheckpointOptions())
    except Exception as error:
        said["second"] = type(error).__name__
    if jax.process_index() == 0:
        data = max((folder / "00000002").rglob("*"), key=lambda p: p.stat().st_size if p.is_file() else 0)
        data.write_bytes(bytes([data.read_bytes()[0] ^ 1]) + data.read_bytes()[1:])
    multihost_utils.sync_global_devices("damaged")
    found = saver.restore(abstract)
    said["restored"] = found.step
    said["same"] = all(np.array_equal(a.data, b.data) for k in state for a, b in zip(found.state[k].addressable_shards, state[k].addressable_shards))
    if jax.process_index() == 0:
        (folder / "00000003.saving").write_text("in the way")
    multihost_utils.sync_global_devices("blocked")
    try:
        saver.save(3, state, {})
    except Exception as error:
        said["blocked"] = type(error).__name__
said["lines"] = lines
print("SAID", json.dumps(said))
"""


def test_two_processes(tmp_path):
    """One manifest, one verdict: both processes agree on the damaged step, the lock and a failed save; one device reads it all."""
    command = [sys.executable, "-c", TWO_PROCESSES, str(tmp_path)]
    pipes = {"stdout": subprocess.PIPE, "stderr": subprocess.PIPE, "text": True}
    runs = [subprocess.Popen(command, env=environment(**peer), **pipes) for peer in peers(2)]
    outs = [run.communicate(timeout=120) for run in runs]
    assert [run.returncode for run in runs] == [0, 0], outs
    said = [json.loads(out.split("SAID ")[1]) for out, _ in outs]
    for one in said:
        assert (one["whole"], one["restored"], one["same"]) == ([2, 1], 1, True)
    assert [one["second"] for one in said] == ["LockedError", "OSError"]
    assert [one["blocked"] for one in said] == ["SaveError", "OSError"]
    assert all("step 2 is damaged" in " ".join(one["lines"]) for one in said)
    whole = {"w": jax.ShapeDtypeStruct((8, 4), jnp.float32), "r": jax.ShapeDtypeStruct((6,), jnp.int32)}
    np.testing.assert_array_equal(restore(tmp_path, whole).state["w"], np.arange(32, dtype=np.float32).reshape(8, 4))
