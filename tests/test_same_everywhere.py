"""Hosts that do not see the same samples are told so before they train on batches that nobody meant."""

import jax
import numpy as np
import pytest
from jax.experimental import multihost_utils

from jaxvl import train
from jaxvl.data.dataset import DataOptions, open_data
from jaxvl.stopping import TERMINATED, stopping


@pytest.mark.parametrize("differs", [False, True])
def test_a_host_with_other_samples_is_named(differs, monkeypatch):
    dataset = open_data(DataOptions(source="glyphs://train?size=64", captions="none"))
    monkeypatch.setattr(jax, "process_count", lambda: 3)
    monkeypatch.setattr(multihost_utils, "process_allgather", lambda mine: np.array([mine, mine, mine + differs], np.uint32))
    if differs:
        with pytest.raises(ValueError, match=r"processes \[2\] see other samples .* config.data.indexes"):
            train._same_everywhere(dataset)
    else:
        train._same_everywhere(dataset)


def test_a_signal_before_the_first_step_of_a_resumed_run(monkeypatch):
    """JAX's service agrees on the call after the highest one made anywhere: number 1 where none was made yet."""
    monkeypatch.setattr(jax, "process_count", lambda: 2)
    monkeypatch.setattr(multihost_utils, "reached_preemption_sync_point", lambda number: number == 1)
    with stopping() as told:
        assert told() == TERMINATED and not told()
