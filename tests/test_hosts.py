"""Which process of a run this is, from flags and from what Slurm, GKE and TPU VMs put into the environment."""

import re
import socket
import threading
from http.server import BaseHTTPRequestHandler, HTTPServer

import jax
import pytest

from jaxvl import hosts
from jaxvl.hosts import Place

STEP = {"SLURM_JOB_ID": "70", "SLURM_STEP_ID": "1", "SLURM_STEP_NUM_TASKS": "5", "SLURM_STEP_NODELIST": "gpu[07-08,11]", "SLURM_STEP_TASKS_PER_NODE": "2(x2),1",
        "SLURM_PROCID": "3", "SLURM_NODEID": "1", "SLURM_LOCALID": "1", "SLURM_NTASKS": "5"}  # fmt: skip


def test_flags_precede_the_environment():
    env = dict(STEP)
    hosts.name_by_flags("a:1", "2/3", env)
    assert hosts.find(env) == Place("a:1", 3, 2)
    for wrong in (("a:1", ""), ("", "0/2"), ("a", "0/2"), ("a:1", "2/2"), ("a:1", "two")):
        with pytest.raises(ValueError, match="write both"):
            hosts.name_by_flags(*wrong, {})


def test_jax_variables_all_or_none():
    with pytest.raises(ValueError, match="JAX_NUM_PROCESSES and JAX_PROCESS_ID is not"):
        hosts.find({"JAX_COORDINATOR_ADDRESS": "a:1"})
    assert hosts.find({}) is None


def test_a_slurm_step():
    assert hosts.find(STEP) == Place("gpu07:62001", 5, 3)
    assert hosts.find({**STEP, "SLURM_STEP_ID": "2"}).coordinator == "gpu07:62002"
    assert hosts.find({**STEP, "SLURM_STEP_NODELIST": "box"}).coordinator.startswith("box:")
    # The GPUs of a node are divided among its tasks, unless Slurm has done so; one task on a node has them all.
    assert hosts.find({**STEP, "CUDA_VISIBLE_DEVICES": "0,1,2,3"}).gpus == "2,3"
    assert hosts.find({**STEP, "CUDA_VISIBLE_DEVICES": "0,1,2,3", "SLURM_GPUS_PER_TASK": "2"}).gpus == ""
    assert hosts.find({**STEP, "CUDA_VISIBLE_DEVICES": "0"}).gpus == ""  # --gpu-bind
    assert hosts.find({**STEP, "CUDA_VISIBLE_DEVICES": "0,1,2,3", "SLURM_NODEID": "2", "SLURM_LOCALID": "0"}).gpus == ""


def test_a_batch_script_is_no_step():
    assert hosts.find({"SLURM_JOB_ID": "70", "SLURM_NTASKS": "5", "SLURM_PROCID": "0"}) is None


@pytest.fixture
def metadata():
    """A metadata server of a TPU VM with two workers, and what it was asked."""
    asked = []

    class Answer(BaseHTTPRequestHandler):
        def do_GET(self):
            asked.append((self.path.rpartition("/")[2], self.headers["Metadata-Flavor"]))
            self.send_response(200)
            self.end_headers()
            self.wfile.write(b"10.0.0.2,10.0.0.3" if "endpoints" in self.path else b"ACCELERATOR_TYPE: 'v5e-8'\n")

        def log_message(self, *_):
            pass

    server = HTTPServer(("127.0.0.1", 0), Answer)
    threading.Thread(target=server.serve_forever, daemon=True).start()
    yield f"127.0.0.1:{server.server_port}", asked
    server.shutdown()


def test_tpu_hosts(tmp_path, metadata):
    assert hosts.tpu_pod({"TPU_WORKER_HOSTNAMES": "a,b"}, tmp_path) and hosts.tpu_pod(
        {"TPU_WORKER_HOSTNAMES": "a", "MEGASCALE_NUM_SLICES": "2"}, tmp_path
    )
    assert not hosts.tpu_pod({"TPU_WORKER_HOSTNAMES": "a,b", "JAX_PLATFORMS": "cpu"}, tmp_path)
    address, asked = metadata
    env = {"GCE_METADATA_IP": address}
    assert not hosts.tpu_pod(env, tmp_path) and asked == []  # no TPU here, so nobody is asked
    (tmp_path / "accel0").touch()
    assert hosts.tpu_pod(env, tmp_path) and asked[0] == ("worker-network-endpoints", "Google")
    assert not hosts.tpu_pod({"GCE_METADATA_IP": "127.0.0.1:9"}, tmp_path)


@pytest.mark.parametrize("text", ["1", "ten", "-5"])
def test_a_heartbeat_that_cannot_be_meant(text, monkeypatch):
    monkeypatch.setenv("JAXVL_HEARTBEAT", text)
    with pytest.raises(ValueError, match=f"JAXVL_HEARTBEAT is '{text}'"):
        hosts.join()


@pytest.mark.parametrize(
    ("env", "named"),
    [
        ({"JAX_COORDINATOR_ADDRESS": "a:1", "JAX_NUM_PROCESSES": "two", "JAX_PROCESS_ID": "0"}, "JAX_NUM_PROCESSES is 'two'"),
        ({"JAX_COORDINATOR_ADDRESS": "a:1", "JAX_NUM_PROCESSES": "2", "JAX_PROCESS_ID": "-1"}, "JAX_PROCESS_ID is '-1'"),
        ({"JAX_COORDINATOR_ADDRESS": "a:1", "JAX_NUM_PROCESSES": "2", "JAX_PROCESS_ID": "2"}, "JAX_PROCESS_ID is 2"),
        ({"JAX_COORDINATOR_ADDRESS": "a", "JAX_NUM_PROCESSES": "2", "JAX_PROCESS_ID": "0"}, "JAX_COORDINATOR_ADDRESS is 'a'"),
        ({"JAX_COORDINATOR_ADDRESS": "a:70000", "JAX_NUM_PROCESSES": "2", "JAX_PROCESS_ID": "0"}, "JAX_COORDINATOR_ADDRESS is 'a:70000'"),
        ({"SLURM_STEP_NUM_TASKS": "x", "SLURM_PROCID": "0"}, "SLURM_STEP_NUM_TASKS is 'x'"),
        ({"SLURM_STEP_NUM_TASKS": "2", "SLURM_PROCID": "0", "SLURM_JOB_ID": "1.5"}, "SLURM_JOB_ID is '1.5'"),
        ({"SLURM_STEP_NUM_TASKS": "2", "SLURM_PROCID": "0", "SLURM_JOB_ID": "1"}, "SLURM_STEP_TASKS_PER_NODE is not set"),
    ],
)
def test_a_variable_that_cannot_be_meant_is_named(env, named):
    with pytest.raises(ValueError, match=re.escape(named)):
        hosts.find(env)


@pytest.mark.parametrize("process", ["3/2", "2/2", "x/2", "1"])
@pytest.mark.parametrize("coordinator", ["localhost:1", "localhost", ""])
def test_flags_that_cannot_be_meant_are_refused(coordinator, process):
    with pytest.raises(ValueError, match="--coordinator="):
        hosts.name_by_flags(coordinator, process, {})


@pytest.mark.parametrize("host", ["127.0.0.1", "localhost", "127.1.2.3"])
def test_a_coordinator_on_the_loopback_listens_there_alone(host):
    with socket.socket() as other:
        other.bind(("127.0.0.1", 0))
        port = other.getsockname()[1]
    assert hosts.listen(f"{host}:{port}") == f"127.0.0.1:{port}"


@pytest.mark.parametrize(("taken", "asked"), [("127.0.0.1", "localhost"), ("0.0.0.0", "127.0.0.1"), ("0.0.0.0", "some.host")])
def test_a_port_that_is_taken_is_told(taken, asked):
    with socket.socket() as other:
        other.bind((taken, 0))
        other.listen()
        with pytest.raises(OSError, match=f"port {other.getsockname()[1]} of the coordinator {asked}"):
            hosts.listen(f"{asked}:{other.getsockname()[1]}")


@pytest.mark.parametrize("env", [{"JAX_NUM_PROCESSES": "2"}, {"JAX_PROCESS_ID": "0"}, {"JAX_NUM_PROCESSES": "2", "JAX_PROCESS_ID": "1"}])
def test_processes_without_a_coordinator_are_not_runs_of_their_own(env):
    with pytest.raises(ValueError, match=f"{next(iter(env))}.* is set but JAX_COORDINATOR_ADDRESS is not"):
        hosts.find(env)


def test_64_bits_are_refused_where_they_are_asked_for():
    with jax.enable_x64(True), pytest.raises(ValueError, match="JAX_ENABLE_X64 is set"):
        hosts.join()
