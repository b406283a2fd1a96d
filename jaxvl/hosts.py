"""The processes of a run: how many, which one this is, where the first one listens, and what they tell each other.

Found in this order: the flags of `jaxvl train`, JAX_COORDINATOR_ADDRESS with its companions (launch/local, launch/jobset.yaml),
a Slurm step, a TPU pod. A process that none of these speaks of is alone.
"""

import os
import re
import socket
import urllib.request
from collections.abc import Mapping, MutableMapping
from pathlib import Path
from typing import Any, NamedTuple

import jax

from jaxvl.processes import gpu_shares
from jaxvl.progress import say

# A process that gives no sign of life for so many seconds counts as dead, and all others end. Who looks does so every second, and the
# news travel in one more; JAX's own 100 s would cost a pod minutes a failure.
HEARTBEAT = 10
FIRST_PORT = 61_440  # above the ports that Linux hands out to connections
METADATA = "metadata.google.internal"


class Place(NamedTuple):
    """One process of a run. coordinator: HOST:PORT of process 0. gpus: its own ones as CUDA_VISIBLE_DEVICES has them, "" for all that it sees."""

    coordinator: str
    processes: int
    number: int
    gpus: str = ""


def join() -> None:
    """Join the other processes of this run, where there are any; must precede any use of a device.

    JAXVL_HEARTBEAT: seconds of silence after which a process counts as dead (default HEARTBEAT). Raises ValueError for variables that cannot be meant.
    """
    env = os.environ
    if "host_platform_device_count" in env.get("XLA_FLAGS", ""):
        # Imitated CPU devices wait for each other in the threads of one pool, which XLA sizes by NPROC; with too few of them
        # two independent collectives of a step can each hold threads that the other needs, for ever.
        env.setdefault("NPROC", "64")
    if jax.config.jax_enable_x64:  # type: ignore[attr-defined]
        raise ValueError("JAX_ENABLE_X64 is set; jaxvl computes in 32 bits and would not compile: unset it")
    text = env.get("JAXVL_HEARTBEAT", str(HEARTBEAT))
    if not text.isdigit() or int(text) < 2:
        raise ValueError(f"JAXVL_HEARTBEAT is {text!r}; it must be a whole number of seconds, at least 2")
    if place := find(env):
        if place.gpus:
            env["CUDA_VISIBLE_DEVICES"] = place.gpus
        jax.distributed.initialize(
            place.coordinator,
            place.processes,
            place.number,
            coordinator_bind_address=listen(place.coordinator) if place.number == 0 else None,
            cluster_detection_method="deactivate",
            heartbeat_timeout_seconds=int(text),
        )
    elif tpu_pod(env):
        jax.distributed.initialize(heartbeat_timeout_seconds=int(text))  # JAX reads slices and workers from the same sources


def listen(coordinator: str) -> str:
    """HOST:PORT that process 0 listens on: this machine alone where the coordinator's address is the loopback, else all addresses.

    Raises OSError where another process listens there; JAX's own service would end this one by a segmentation fault.
    """
    host, _, port = coordinator.rpartition(":")
    inner = host.strip("[]")
    loopback = inner == "localhost" or inner.startswith("127.") or inner == "::1"
    where = ("::1" if inner == "::1" else "127.0.0.1") if loopback else ("::" if _has_ipv6() else "0.0.0.0")
    with socket.socket(socket.AF_INET6 if ":" in where else socket.AF_INET) as probe:
        # As the service itself: a port in the aftermath of an earlier connection is free.
        probe.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
        try:
            probe.bind((where, int(port)))
            probe.listen()
        except OSError as error:
            raise OSError(
                f"process 0 cannot listen on port {port} of the coordinator {coordinator}: {error.strerror} (is an earlier run "
                f"still there?); free it, or choose another port with --coordinator or JAX_COORDINATOR_ADDRESS for all processes"
            ) from None
    return f"[{where}]:{port}" if ":" in where else f"{where}:{port}"


def _has_ipv6() -> bool:
    try:
        with socket.socket(socket.AF_INET6) as probe:
            probe.bind(("::", 0))
        return True
    except OSError:
        return False


def name_by_flags(coordinator: str, process: str, env: MutableMapping[str, str]) -> None:
    """Write the flags --coordinator=HOST:PORT --process=I/N into `env`, where they precede all else. Raises ValueError for what they cannot mean."""
    if not coordinator and not process:
        return
    found = re.fullmatch(r"([0-9]{1,12})/([0-9]{1,12})", process)
    if not coordinator or not found or int(found[1]) >= int(found[2]):
        raise ValueError(f"--coordinator={coordinator} --process={process}: write both, as HOST:PORT and I/N with I from 0 to N - 1")
    _address(coordinator, f"--process={process}: write both, and --coordinator")
    env.update(JAX_COORDINATOR_ADDRESS=coordinator, JAX_PROCESS_ID=found[1], JAX_NUM_PROCESSES=found[2])


def find(env: Mapping[str, str]) -> Place | None:
    """The place that JAX's variables or a Slurm step give this process; None where it is alone or in a TPU pod."""
    named = ("JAX_COORDINATOR_ADDRESS", "JAX_NUM_PROCESSES", "JAX_PROCESS_ID")
    if named[0] in env:
        if missing := [k for k in named if k not in env]:
            raise ValueError(f"{named[0]} is set but {' and '.join(missing)} is not; set all three or none")
        processes, number = _number(env, named[1]), _number(env, named[2])
        if number >= processes:
            raise ValueError(f"{named[2]} is {number}; it must be below {named[1]}, which is {processes}")
        return Place(_address(env[named[0]], named[0]), processes, number)
    if alone := [k for k in named if k in env]:  # each process would be a run of its own, and all of them in one workdir
        raise ValueError(f"{' and '.join(alone)} is set but {named[0]} is not; set all three or none")
    # SLURM_NTASKS alone is also set where nothing was started with srun: in the batch script itself, in a shell of salloc.
    if _number(env, "SLURM_STEP_NUM_TASKS", "1") > 1 and "SLURM_PROCID" in env:
        return _slurm(env)
    return None


def _slurm(env: Mapping[str, str]) -> Place:
    """A task of a step. The port differs from step to step, so that a step started anew never meets what is left of the one before."""
    port = FIRST_PORT + (8 * _number(env, "SLURM_JOB_ID") + _number(env, "SLURM_STEP_ID", "0")) % 4096
    nodes, node = tasks_per_node(_named(env, "SLURM_STEP_TASKS_PER_NODE")), _number(env, "SLURM_NODEID")
    if node >= len(nodes):
        raise ValueError(
            f"SLURM_NODEID is {node}, but SLURM_STEP_TASKS_PER_NODE={env['SLURM_STEP_TASKS_PER_NODE']} names {len(nodes)} nodes"
        )
    here = nodes[node]
    # With --gpus-per-task or --gpu-bind a task sees its own alone.
    bound = "SLURM_GPUS_PER_TASK" in env or len(env.get("CUDA_VISIBLE_DEVICES", "," * here).split(",")) < here
    local = _number(env, "SLURM_LOCALID")
    if local >= here:
        raise ValueError(f"SLURM_LOCALID is {local}, but this node has {here} tasks of the step")
    share = {} if bound else gpu_shares(here, env)[local]
    return Place(
        f"{first_host(_named(env, 'SLURM_STEP_NODELIST'))}:{port}",
        _number(env, "SLURM_STEP_NUM_TASKS"),
        _number(env, "SLURM_PROCID"),
        share.get("CUDA_VISIBLE_DEVICES", ""),
    )


def _named(env: Mapping[str, str], name: str) -> str:
    """Raises ValueError where Slurm has set its other variables and not this one."""
    if name not in env:
        raise ValueError(f"{name} is not set, though this is a task of a Slurm step; start the processes with srun")
    return env[name]


def _number(env: Mapping[str, str], name: str, default: str = "") -> int:
    """A variable that is a whole number. Raises ValueError where it is none."""
    text = env.get(name, default)
    if not re.fullmatch(r"[0-9]{1,12}", text):
        raise ValueError(f"{name} is {text!r}; it must be a whole number, 0 or greater")
    return int(text)


def _address(text: str, name: str) -> str:
    """Raises ValueError where an address is no HOST:PORT."""
    found = re.fullmatch(r"(\[[0-9A-Fa-f:.]+\]|[^:\s]+):([0-9]{1,5})", text)
    if not found or not 0 < int(found[2]) < 2**16:
        raise ValueError(f"{name} is {text!r}; it must be HOST:PORT with a port from 1 to 65535")
    return text


def first_host(nodes: str) -> str:
    """ "gpu[007-011,3],x1" -> "gpu007"."""
    found = re.match(r"([^,\[]+)(?:\[(\d+)[^\]]*\])?", nodes)
    if not found:
        raise ValueError(f"SLURM_STEP_NODELIST is {nodes!r}, which names no host")
    return found[1] + (found[2] or "")


def tasks_per_node(text: str) -> list[int]:
    """ "2(x3),1" -> [2, 2, 2, 1]."""
    parts = (re.fullmatch(r"(\d+)(?:\(x(\d+)\))?", part) for part in text.split(","))
    return [int(part[1]) for part in parts if part for _ in range(int(part[2] or 1))]


def tpu_pod(env: Mapping[str, str], devices: Path = Path("/dev")) -> bool:
    """Whether this is a TPU host with others beside it: by the variables GKE sets, else by the metadata of a TPU VM."""
    if env.get("JAX_PLATFORMS", "").split(",")[0] not in ("", "tpu"):
        return False
    if (
        "," in env.get("TPU_WORKER_HOSTNAMES", "")
        or "," in env.get("TPU_PROCESS_ADDRESSES", "")
        or _number(env, "MEGASCALE_NUM_SLICES", "1") > 1
    ):
        return True
    attached = [*devices.glob("accel[0-9]*"), *devices.glob("vfio/[0-9]*")]
    if not attached or "TPU_WORKER_HOSTNAMES" in env or "TPU_SKIP_MDS_QUERY" in env:
        return False
    try:
        hosts = _metadata("worker-network-endpoints", env)
        slices = re.search(r"MEGASCALE_NUM_SLICES: '?(\d+)", _metadata("tpu-env", env))
    except OSError as error:
        say(
            f"note: this machine has {attached[0].name}, but its metadata cannot be read ({error}); it runs alone, unless TPU_WORKER_HOSTNAMES names its peers"
        )
        return False
    return "," in hosts or bool(slices and int(slices[1]) > 1)


def _metadata(key: str, env: Mapping[str, str]) -> str:
    """An attribute of the virtual machine. Raises OSError where there is none."""
    url = f"http://{env.get('GCE_METADATA_IP', METADATA)}/computeMetadata/v1/instance/attributes/{key}"
    with urllib.request.urlopen(urllib.request.Request(url, headers={"Metadata-Flavor": "Google"}), timeout=5) as answer:
        return answer.read().decode()


class Board:
    """A few words of each process, kept by process 0 for all to read; no device takes part. One a run of several processes."""

    def __init__(self, client: Any, index: int) -> None:
        self._client, self._index = client, index

    def post(self, words: str) -> None:
        """Replace this process's words. Raises RuntimeError where process 0 cannot be reached."""
        self._client.key_value_set(f"jaxvl/board/{self._index}", words, allow_overwrite=True)

    def read(self) -> dict[int, str]:
        """The words of every process that has posted any. Raises as `post`."""
        return {int(key.rpartition("/")[2]): words for key, words in self._client.key_value_dir_get("jaxvl/board")}


def board() -> Board | None:
    """The board of this run; None in a run of one process."""
    if jax.process_count() == 1:
        return None
    from jax._src import distributed  # the one way to the store of JAX's own service

    return Board(distributed.global_state.client, jax.process_index())
