"""What a point costs in seconds, and the lines that points are kept in."""

from __future__ import annotations

import pytest
import torch

from denoiselab.app.frontier_costs import timed, typical
from denoiselab.app.frontier_points import POINTS, check_shared, read_lines


def test_seconds_are_the_median_over_whole_batches():
    assert typical([(10, 50.0), (10, 1.0), (10, 2.0), (3, 0.03)]) == 0.2


def test_every_batch_is_timed_and_passed_on():
    batches = [(torch.arange(2), torch.zeros(2, 1, 1, 1)), (torch.arange(1), torch.zeros(1, 1, 1, 1))]
    spent = []
    assert list(timed(lambda numbers: iter(batches), spent)(range(3))) == batches
    assert [size for size, _ in spent] == [2, 1]
    assert all(seconds >= 0 for _, seconds in spent)


def test_lines_that_cannot_be_read_are_as_if_not_there(tmp_path):
    whole = '{"key": "a", "count": 4, "nfe": 1, "seconds": 0.1, "numbers": [], "shared": {"seed": 0}}'
    torn = [
        whole[:30],
        "",
        "[1]",
        "null",
        '{"numbers": 3}',
        '{"key": "b", "numbers": []}',
        '{"numbers": [{"name": "x"}]}',
    ]
    (tmp_path / POINTS).write_text("\n".join([*torn, whole, whole.replace('"a"', '"b"')]))  # the last line has no end
    (line,) = read_lines(tmp_path)
    assert line["key"] == "a"
    check_shared([line], {"seed": 0})
    with pytest.raises(ValueError, match="its points have seed=0, new ones would have 1"):
        check_shared([line], {"seed": 1})
