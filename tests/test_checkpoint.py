"""Checkpoints: what is saved comes back, bit for bit; what is damaged, half written or another run's never does."""

import json
import os
import resource
import shutil
import socket
import subprocess
import sys
import threading
from contextlib import contextmanager
from pathlib import Path
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from hypothesis import given, settings, strategies as st
from jax.sharding import NamedSharding, PartitionSpec as P

from jaxvl import checkpoint, manifest
from jaxvl.checkpoint import CheckpointOptions, SaveError, best_step, open_saver, restore, restore_memory, restore_params, verified
from jaxvl.manifest import DamagedError, LockedError, whole_steps
from jaxvl.mesh import MeshOptions, make_mesh


class State(NamedTuple):
    step: Any
    params: Any
    ema: Any
    opt_state: Any
    memory: Any
    key: Any


def make_state(seed: int = 0, *, ema: bool = True) -> State:
    draw = lambda *shape: jnp.asarray(np.random.default_rng([seed, *shape]).normal(size=shape), jnp.float32)
    params = {"image": {"kernel": draw(16, 8), "bias": draw(8)}, "scale": draw()}
    return State(
        step=jnp.int32(seed),
        params=params,
        ema=jax.tree.map(lambda p: p + 1, params) if ema else (),
        opt_state=({"mu": {"kernel": draw(16, 8).astype(jnp.bfloat16)}}, (), {"count": jnp.int32(7)}),
        memory={"queue": draw(0, 8), "none": {}},
        key=jax.random.key_data(jax.random.key(seed)),
    )


def abstract(state: Any, mesh: Any = None, spec: P = P()) -> Any:
    """Shapes with shardings: `spec` for matrices of 16 rows, replicated elsewhere; on one device without a mesh."""

    def one(x: Any) -> jax.ShapeDtypeStruct:
        sharding = x.sharding if mesh is None else NamedSharding(mesh, spec if x.shape[:1] == (16,) else P())
        return jax.ShapeDtypeStruct(x.shape, x.dtype, sharding=sharding)

    return jax.tree.map(one, state)


def same_bits(a: Any, b: Any) -> None:
    assert jax.tree.structure(a) == jax.tree.structure(b)
    for x, y in zip(jax.tree.leaves(a), jax.tree.leaves(b), strict=True):
        assert x.dtype == y.dtype and x.shape == y.shape
        assert np.asarray(x).tobytes() == np.asarray(y).tobytes()


def save_steps(folder: Path, *steps: int, **options: Any) -> None:
    with open_saver(folder, CheckpointOptions(**{"keep": 99, **options})) as saver:
        for step in steps:
            saver.save(step, make_state(step), {"position": step})


def files_of(folder: Path) -> list[Path]:
    return sorted(p for p in folder.rglob("*") if p.is_file())


@contextmanager
def flipped(path: Path, at: int, bit: int = 0):
    """One bit of a file inverted while the block runs."""
    good = path.read_bytes()
    path.write_bytes(good[:at] + bytes([good[at] ^ (1 << bit)]) + good[at + 1 :])
    yield
    path.write_bytes(good)


def test_round_trip(tmp_path):
    state, meta = make_state(3), {"position": [0, 4096], "config": "seed: 1\n", "bad": {"empty": 2}}
    with open_saver(tmp_path, CheckpointOptions()) as saver:
        assert saver.restore(abstract(state)) is None
        saver.save(3, state, meta, {"val/r@1": jnp.float32(0.5), "loss": np.nan})
    found = restore(tmp_path, abstract(state))
    assert (found.step, found.meta) == (3, meta)
    same_bits(found.state, state)
    written = json.loads((tmp_path / "00000003" / "manifest.json").read_text())
    assert written["metrics"] == {"val/r@1": 0.5, "loss": None}
    assert set(written["files"]) == {str(p.relative_to(tmp_path / "00000003")) for p in files_of(tmp_path / "00000003")} - {"manifest.json"}


def test_a_method_that_remembers_nothing_has_that_to_restore(tmp_path):
    with open_saver(tmp_path, CheckpointOptions()) as saver:
        saver.save(3, {"params": {"w": np.zeros(2)}}, {}, block=True)
    assert restore_memory(tmp_path, {}).state == {}


def test_donation_right_after_save(tmp_path):
    """The step that follows may overwrite the saved buffers; the checkpoint must not see it."""
    mesh = make_mesh(MeshOptions(fsdp=8))
    with jax.set_mesh(mesh), open_saver(tmp_path, CheckpointOptions()) as saver:
        spread = lambda x: jax.device_put(x, NamedSharding(mesh, P("fsdp")))
        state = {"a": spread(jnp.arange(1 << 16, dtype=jnp.float32)), "b": jnp.ones((256, 256))}
        before = jax.tree.map(lambda x: np.array(x), state)
        update = jax.jit(lambda s: jax.tree.map(lambda x: -x * 3, s), donate_argnums=0)
        saver.save(1, state, {})
        for _ in range(3):
            state = update(state)
        jax.block_until_ready(state)
        saver.wait()
        same_bits(jax.tree.map(np.asarray, restore(tmp_path, abstract(state)).state), before)


def test_save_returns_before_the_manifest(tmp_path, monkeypatch):
    write, go = manifest.write, threading.Event()
    monkeypatch.setattr(manifest, "write", lambda *args: (go.wait(30), write(*args)))
    with open_saver(tmp_path, CheckpointOptions()) as saver:
        saver.save(1, make_state(), {})
        assert whole_steps(tmp_path) == []  # written in full by Orbax or not, it is not whole yet
        go.set()
        saver.wait()
        assert whole_steps(tmp_path) == [1]


def test_a_run_that_fails_keeps_its_last_save(tmp_path):
    with pytest.raises(ZeroDivisionError), open_saver(tmp_path, CheckpointOptions()) as saver:
        saver.save(4, make_state(4), {})
        raise ZeroDivisionError
    with open_saver(tmp_path, CheckpointOptions()) as saver:  # the lock is free
        same_bits(saver.restore(abstract(make_state())).state, make_state(4))


@pytest.mark.parametrize("saved, wanted", [((8, 1, 1), (2, 4, 1)), ((1, 8, 1), (1, 2, 4)), ((2, 2, 2), (1, 1, 1)), ((1, 1, 1), (1, 8, 1))])
def test_another_mesh(tmp_path, saved, wanted):
    meshes = [make_mesh(MeshOptions(*sizes), jax.devices()[: int(np.prod(sizes))]) for sizes in (saved, wanted)]
    state = make_state(1)
    placed = jax.tree.map(lambda x, s: jax.device_put(x, s.sharding), state, abstract(state, meshes[0], P("fsdp", "tensor")))
    with open_saver(tmp_path, CheckpointOptions()) as saver:
        saver.save(1, placed, {})
    target = abstract(state, meshes[1], P("fsdp", "tensor"))
    found = restore(tmp_path, target).state
    same_bits(found, state)
    for leaf, want in zip(jax.tree.leaves(found), jax.tree.leaves(target), strict=True):
        assert leaf.sharding == want.sharding
        assert leaf.addressable_shards[0].data.shape == want.sharding.shard_shape(want.shape)


def test_one_flipped_bit_in_every_file(tmp_path, caplog):
    save_steps(tmp_path, 1, 2)
    shape, rng = abstract(make_state()), np.random.default_rng(0)
    for path in files_of(tmp_path / "00000002"):
        size, name = path.stat().st_size, str(path.relative_to(tmp_path / "00000002"))
        if not size:
            continue
        with flipped(path, int(rng.integers(size)), int(rng.integers(8))):
            caplog.clear()
            assert restore(tmp_path, shape).step == 1
            [line] = [r.getMessage() for r in caplog.records if r.name == "jaxvl.restore"]
            assert "step 2 is damaged" in line and name in line
            with pytest.raises(DamagedError, match=name):
                restore(tmp_path, shape, step=2)
            with pytest.raises(DamagedError, match=name):
                restore_params(tmp_path, shape.params, step=2)
    same_bits(restore(tmp_path, shape).state, make_state(2))


def test_every_byte_of_the_manifest_counts(tmp_path):
    path = manifest.step_folder(tmp_path, 1) / "manifest.json"
    path.parent.mkdir()
    manifest.write(path.parent, 1, {"position": 1}, {"r": 0.5}, {"params/scale": "float32[]"})
    good = path.read_bytes()
    for at in range(len(good)):
        path.write_bytes(good[:at] + bytes([good[at] ^ (1 << at % 8)]) + good[at + 1 :])
        with pytest.raises(DamagedError, match=r"manifest.json"):
            manifest.read(tmp_path, 1)
    path.write_bytes(good)
    assert verified(tmp_path).step == 1


@pytest.mark.parametrize("damage", ["cut", "grown", "gone", "manifest gone", "renamed"])
def test_other_damage(tmp_path, damage):
    save_steps(tmp_path, 1, 2)
    data = max(files_of(tmp_path / "00000002" / "state"), key=lambda p: p.stat().st_size)
    name = {"manifest gone": "manifest.json", "renamed": "belongs to step 2"}.get(damage, data.name)
    if damage == "cut":
        os.truncate(data, data.stat().st_size - 1)
    elif damage == "grown":
        data.write_bytes(data.read_bytes() + b"\0")
    elif damage == "gone":
        data.unlink()
    elif damage == "manifest gone":
        (tmp_path / "00000002" / "manifest.json").unlink()
    else:
        shutil.copytree(tmp_path / "00000002", tmp_path / "00000003")
    newest = whole_steps(tmp_path)[0]
    with pytest.raises(DamagedError, match=name):
        restore(tmp_path, abstract(make_state()), newest)
    assert restore(tmp_path, abstract(make_state())).step == newest - 1


def test_all_damaged_is_an_error_not_a_fresh_start(tmp_path):
    save_steps(tmp_path, 1, 2)
    for step in ("00000001", "00000002"):
        (tmp_path / step / "manifest.json").unlink()
    with pytest.raises(DamagedError, match="all 2 checkpoints are damaged"):
        restore(tmp_path, abstract(make_state()))
    with pytest.raises(FileNotFoundError, match=r"no checkpoint of step 7.*\[2, 1\]"):
        restore(tmp_path, abstract(make_state()), 7)


def test_mismatch_lists_every_leaf(tmp_path):
    save_steps(tmp_path, 1)
    state = make_state()
    other = state._replace(params={"image": {"kernel": jnp.zeros((16, 9)), "bias": jnp.zeros(8, jnp.bfloat16)}, "extra": jnp.zeros(2)})
    with pytest.raises(ValueError) as info:
        restore(tmp_path, abstract(other))
    for line in (
        "4 leaves",
        "params/image/kernel: saved float32[16,8], wanted float32[16,9]",
        "params/image/bias: saved float32[8], wanted bfloat16[8]",
        "params/extra: saved nothing, wanted float32[2]",
        "params/scale: saved float32[], wanted nothing",
    ):
        assert line in str(info.value)


def test_params_alone(tmp_path):
    save_steps(tmp_path, 5)
    state = make_state(5)
    same_bits(restore_params(tmp_path, abstract(state.params)).state, state.params)
    same_bits(restore_params(tmp_path, abstract(state.params), ema=True, step=5).state, state.ema)
    on_host = jax.tree.map(lambda x: jax.ShapeDtypeStruct(x.shape, x.dtype), state.params)
    assert all(isinstance(x, np.ndarray) for x in jax.tree.leaves(restore_params(tmp_path, on_host).state))
    with open_saver(tmp_path, CheckpointOptions()) as saver:
        saver.save(6, make_state(6, ema=False), {})
    with pytest.raises(ValueError, match="step 6 has no ema/"):
        restore_params(tmp_path, abstract(state.params), ema=True)
    with pytest.raises(FileNotFoundError, match="no checkpoint"):
        restore_params(tmp_path / "empty", abstract(state.params))


@settings(max_examples=30, deadline=None)
@given(
    keep=st.integers(1, 4),
    keep_every=st.sampled_from([0, 2, 5]),
    mode=st.sampled_from(["max", "min"]),
    values=st.lists(st.sampled_from([None, 0.1, 0.2, 0.3]), min_size=1, max_size=12),
)
def test_keep_policy(tmp_path_factory, keep, keep_every, mode, values):
    """Steps 1, 2, ... with the given metric values, pruned after each, against the rule said once more."""
    folder, options = tmp_path_factory.mktemp("keep"), CheckpointOptions(keep=keep, keep_every=keep_every, best="r", best_mode=mode)
    alive: list[int] = []
    saver = checkpoint.Saver.__new__(checkpoint.Saver)  # only the pruning, without Orbax: 30 examples of 12 saves
    saver.folder, saver.options = folder, options
    for step, value in enumerate(values, 1):
        target = manifest.step_folder(folder, step)
        target.mkdir()
        manifest.write(target, step, {}, {"r": value}, {})
        saver._prune()
        alive.append(step)
        scored = [s for s in alive if values[s - 1] is not None]
        sign = 1 if mode == "max" else -1
        best = max(scored, key=lambda s: (sign * values[s - 1], s), default=None)
        alive = [s for s in alive if s in alive[-keep:] or s == best or (keep_every and s % keep_every == 0)]
        assert sorted(whole_steps(folder)) == alive
        assert best_step(folder, options) == best
    shutil.rmtree(folder)


def test_pruned_while_saving(tmp_path, caplog):
    with open_saver(tmp_path, CheckpointOptions(keep=2, best="r")) as saver:
        saver.save(1, make_state(1), {}, {"loss": 1.0})
        assert "best is 'r', which no evaluation has given yet; this one gives ['loss']" in caplog.text
        for step, r in enumerate([0.1, 0.9, 0.2, 0.3, 0.4], 2):
            saver.save(step, make_state(step), {}, {"r": r})
        saver.save(7, make_state(7), {}, {"loss": 1.0})
    assert sorted(p.name for p in tmp_path.iterdir()) == ["00000003", "00000006", "00000007", "LOCK"]
    assert len(caplog.records) == 1


def test_leftovers_of_killed_runs(tmp_path):
    save_steps(tmp_path, 1)
    shutil.copytree(tmp_path / "00000001", tmp_path / "00000002.saving")
    shutil.copytree(tmp_path / "00000001", tmp_path / "00000000.deleting")
    (tmp_path / "notes.txt").write_text("mine")
    assert whole_steps(tmp_path) == [1]
    with open_saver(tmp_path, CheckpointOptions()) as saver:
        assert (tmp_path / "00000002.saving").exists()  # what opens a run may still refuse to go on with it
        saver.restore(abstract(make_state()))
    assert sorted(p.name for p in tmp_path.iterdir()) == ["00000001", "LOCK", "notes.txt"]


def test_delete_cut_short_never_looks_whole(tmp_path, monkeypatch):
    save_steps(tmp_path, 1, 2)
    seen = []
    monkeypatch.setattr(shutil, "rmtree", lambda path, **_: seen.append((Path(path).name, whole_steps(tmp_path))))
    manifest.delete(tmp_path, 1)
    assert seen == [("00000001.deleting", [2])]


def test_saves_of_another_branch_are_set_aside(tmp_path, caplog):
    """Step 2 is damaged, the run goes on from 1: its own step 2 takes the place, and nothing of the old one is lost."""
    save_steps(tmp_path, 1, 2, 3)
    for step in (2, 3):
        (tmp_path / f"{step:08d}" / "manifest.json").unlink()
    for _ in range(2):
        with open_saver(tmp_path, CheckpointOptions(keep=9)) as saver:
            assert saver.restore(abstract(make_state()), 1).step == 1
            saver.save(1, make_state(8), {})  # the restored step is there already
            saver.save(2, make_state(9), {})
            saver.save(2, make_state(8), {})
    same_bits(restore(tmp_path, abstract(make_state())).state, make_state(9))
    same_bits(restore(tmp_path, abstract(make_state()), 1).state, make_state(1))
    assert sorted(p.name for p in tmp_path.iterdir() if p.is_dir()) == [
        "00000001",
        "00000002",
        "00000002.aside",
        "00000002.aside1",
        "00000003.aside",
    ]
    assert "step 3 was there before this run reached it" in caplog.text


def test_second_run_is_refused(tmp_path):
    with open_saver(tmp_path, CheckpointOptions()), pytest.raises(LockedError, match=f"process {os.getpid()} on {socket.gethostname()}"):
        open_saver(tmp_path, CheckpointOptions())
    open_saver(tmp_path, CheckpointOptions()).close()


def test_lock_of_a_killed_run_is_free(tmp_path):
    hold = "import pathlib, sys, time; from jaxvl import manifest; f = manifest.lock(pathlib.Path(sys.argv[1])); print('held', flush=True); time.sleep(60)"
    process = subprocess.Popen([sys.executable, "-c", hold, str(tmp_path)], stdout=subprocess.PIPE, text=True)
    assert process.stdout.readline() == "held\n"
    with pytest.raises(LockedError, match=f"process {process.pid} on "):
        open_saver(tmp_path, CheckpointOptions())
    process.kill()
    process.wait()
    open_saver(tmp_path, CheckpointOptions()).close()


@contextmanager
def small_disk(folder: Path):
    """A folder on a file system of 3 MB; needs root."""
    folder.mkdir()
    if subprocess.run(["mount", "-t", "tmpfs", "-o", "size=3m", "tmpfs", str(folder)], capture_output=True).returncode:
        pytest.skip("cannot mount a small tmpfs here; the file size limit is tested instead")
    try:
        yield
    finally:
        subprocess.run(["umount", "--lazy", str(folder)], check=True)  # a failed write may still be let go of


@contextmanager
def small_files(_: Path):
    """No file above 3 MB."""
    limits = resource.getrlimit(resource.RLIMIT_FSIZE)
    resource.setrlimit(resource.RLIMIT_FSIZE, (3 << 20, limits[1]))
    try:
        yield
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, limits)


@pytest.mark.filterwarnings("ignore::pytest.PytestUnraisableExceptionWarning")  # TensorStore calls back into Orbax's closed loop
@pytest.mark.parametrize("limit, words", [(small_disk, "No space left on device"), (small_files, "File too large")])
def test_full_disk(tmp_path, limit, words):
    folder = tmp_path / "disk"
    noise = lambda size: {"a": jnp.asarray(np.random.default_rng(0).normal(size=size), jnp.float32)}
    with limit(folder), open_saver(folder, CheckpointOptions()) as saver:
        saver.save(1, noise(1 << 16), {}, block=True)
        saver.save(2, noise(1 << 20), {})
        with pytest.raises(SaveError, match=rf"step 2 .*{folder}: {words}; it needs at least 4,194,304 bytes, [\d,]+ are free; .*\[1\]"):
            saver.wait()
        assert sorted(p.name for p in folder.iterdir()) == ["00000001", "LOCK"]
        saver.save(3, noise(1 << 16), {}, block=True)  # the disk has room again: the saver still works
        same_bits(restore(folder, abstract(noise(1 << 16))).state, noise(1 << 16))


@pytest.mark.parametrize(
    "options, words",
    [({"every": 0}, "every is 0"), ({"keep": 0}, "keep is 0"), ({"keep_every": -1}, "keep_every is -1"), ({"best_mode": "most"}, "'most'")],
)
def test_options(tmp_path, options, words):
    with pytest.raises(ValueError, match=words):
        open_saver(tmp_path, CheckpointOptions(**options))
    with pytest.raises(ValueError, match="a bucket cannot rename"):
        open_saver(Path("gs://bucket/run"), CheckpointOptions())


def test_a_disk_that_is_not_mounted_is_no_beginning(tmp_path):
    """The folder is there and empty, as a mount point is; what was saved elsewhere must not be trained anew unasked."""
    folder = tmp_path / "checkpoints"
    with open_saver(folder, CheckpointOptions()) as saver:
        saver.save(3, {"w": jnp.ones(2)}, {}, block=True)
    folder.rename(tmp_path / "elsewhere")
    with pytest.raises(ValueError, match="has no checkpoint, though step 3 was saved there: is its disk mounted"):
        open_saver(folder, CheckpointOptions())
    (tmp_path / "checkpoints.newest").unlink()
    open_saver(folder, CheckpointOptions()).close()
