"""The history of samples that survives: of several processes, cut where a run is resumed, and checked row by row."""

import pytest

from jaxvl.report.samples import open_samples, read_samples


def feed(folder, process, processes, step, lines):
    writer = open_samples(folder, process, processes, step)
    for number, row, ids in lines:
        writer.write(number, {"row": row, "ids": ids})
    writer.close()


def test_a_run_that_goes_on_with_fewer_processes(tmp_path):
    for process in (0, 1):
        feed(tmp_path, process, 2, 0, [(step, 2 * process, [10 * step + 2 * process, 10 * step + 2 * process + 1]) for step in (1, 2, 3)])
    feed(tmp_path, 0, 1, 2, [(3, 0, [7, 8, 9, 6])])
    assert read_samples(tmp_path, 4) == {1: [10, 11, 12, 13], 2: [20, 21, 22, 23], 3: [7, 8, 9, 6]}


@pytest.mark.parametrize(
    "lines", [[(1, 0, [1, 2])], [(1, 0, [1, 2, 3]), (1, 2, [3, 4])], [(1, 0, [1, 2, 3, 4]), (1, 0, [1, 2, 3, 4])], [(1, 1, [1, 2, 3, 4])]]
)
def test_rows_that_are_missing_or_given_twice(tmp_path, lines):
    feed(tmp_path, 0, 1, 0, lines)
    with pytest.raises(ValueError, match="step 1 was given rows"):
        read_samples(tmp_path, 4)
