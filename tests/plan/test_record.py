"""The plan that is kept with a run, and the table of the large recipes."""

import json
from types import SimpleNamespace

import jax
import pytest

from jaxvl import config as configs
from jaxvl.assembly import program
from jaxvl.mesh import make_mesh
from jaxvl.plan import chips, record, scale, shapes

QUICK = "configs/clip_quickstart.py"


@pytest.mark.parametrize(
    ("kind", "name"), [("TPU v5 lite", "v5e"), ("TPU v5", "v5p"), ("TPU v6 lite", "v6e"), ("NVIDIA H100 80GB HBM3", "h100"), ("cpu", "cpu")]
)
def test_a_device_is_known_by_jaxs_name_of_it(kind, name):
    found = chips.here(kind, 4, 0)
    assert (found.name, found.chip.hbm) == (f"{name}:4", chips.CHIPS[name].hbm)
    assert chips.here(kind, 4, 123).chip.hbm == 123


def test_every_accelerator_has_its_figures():
    for chip in chips.CHIPS.values():
        assert chip.name == "cpu" or (chip.hbm > 10**10 and chip.peak > 10**14 and chip.link > 10**11)


def test_a_runs_own_program_is_kept_with_it(tmp_path):
    recipe = configs.read(configs.load(QUICK, ["train.batch_size=8", "image.depth=1", "tokenizer.vocab_size=512"]))
    mesh = make_mesh(recipe.mesh)
    with jax.set_mesh(mesh):
        parts = shapes.planned(recipe).parts
        run = program(parts, mesh, 900)
        compiled = jax.jit(lambda state: state.step + 1).lower(run.state).compile()  # what is kept is of the program that is given
        record.save(tmp_path, parts, run, compiled, mesh, 900)
    found = json.loads((tmp_path / "plan.json").read_text())
    assert found["topology"] == "cpu:8" and found["source"] == "the run's own program" and found["fits"] is None
    assert found["held"] == shapes.held(run) and found["held"]["opt_state"] > 1.9 * found["held"]["params"]
    assert found["total"] == sum(found["held"].values()) + found["temporary"] + found["other"]


def test_a_program_that_cannot_be_read_stops_no_run(tmp_path):
    recipe = configs.read(configs.load(QUICK, ["train.batch_size=8", "image.depth=1", "tokenizer.vocab_size=512"]))
    mesh = make_mesh(recipe.mesh)
    with jax.set_mesh(mesh):
        parts = shapes.planned(recipe).parts
        run = program(parts, mesh, 900)
        record.save(tmp_path, parts, run, SimpleNamespace(memory_analysis=lambda: None, as_text=lambda: "%x = gibberish("), mesh, 900)
    found = json.loads((tmp_path / "plan.json").read_text())
    assert found["total"] == sum(found["held"].values()) and found["source"] == "shapes of the state alone"
    assert any("could not be read" in note for note in found["notes"])


def test_the_table_reads_again_what_it_has_and_tells_where_a_number_is_from(tmp_path, monkeypatch):
    made, make = {}, scale.fit.make  # one that fails is no plan, and made anew
    monkeypatch.setattr(
        scale.fit,
        "make",
        lambda config, *rest, **how: (
            made.get(config.train.batch_size) or made.setdefault(config.train.batch_size, make(config, *rest, **how))
        ),
    )
    rows = [scale.Row(QUICK, "h100:8", ("train.batch_size=16",)), scale.Row(QUICK, "h100:8", ("train.batch_size=17",))]
    first = scale.table(tmp_path, limit=1, estimate=False, rows=rows[:1])
    assert "| clip_quickstart | h100:8 | 16 |" in first and first.endswith("model |")
    (file,) = tmp_path.iterdir()
    kept = json.loads(file.read_text())
    file.write_text(json.dumps({**kept, "temporary": 7 * 2**30, "source": "compiled by hand"}))
    again = scale.table(tmp_path, limit=1, estimate=False, rows=rows)
    assert "| 7.00 |" in again and "compiled |" in again and "it must be a multiple of 8 |" in again
    for other in ({"flops": 1.0}, {"modelled": 1}):  # of another program, also where only what it holds on the way differs
        file.write_text(json.dumps({**kept, **other, "temporary": 7 * 2**30}))
        assert scale.table(tmp_path, limit=1, estimate=False, rows=rows[:1]) == first
