"""The benches of proxies and of evaluation at sizes of seconds: their numbers are there and mean what they say."""

import numpy as np

from jaxvl.bench import evaluation, proxies


def test_a_device_of_eight_needs_an_eighth_and_nothing_of_the_largest_size_is_allocated():
    rows = proxies.steps((4096,), 1)
    assert [(row["classes"], row["layout"]) for row in rows] == [(4096, "whole"), (4096, "sharded"), (4096, "sampled")]
    assert rows[0]["less_than_whole"] == 1 and rows[1]["less_than_whole"] > 7 and all(row["step_s"] > 0 for row in rows)
    states = proxies.compile_step(4096, "sharded")
    assert rows[0]["bytes_a_device"] > 3 * 4096 * proxies.WIDTH * 4  # proxies and both moments
    assert {leaf.sharding.shard_shape(leaf.shape)[0] for leaf in (states.args[0][0]["proxies"],)} == {512}
    assert all(row["bytes_a_device"] > 3 * 2**20 * proxies.WIDTH * 4 / 8 for row in proxies.compiled_only(2**20))


def test_the_streamed_numbers_are_checked_against_the_matrix():
    got = evaluation.run(300, 60, 16, part=120)
    assert got["matrix_bytes"] == 4 * 300 * 300 and 0 < got["numbers"]["r@1"] <= 1 and np.isfinite(got["numbers"]["map@r"])
    assert got["streamed_s"] > 0 and got["part_matrix_s"] > 0
