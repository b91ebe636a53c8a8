from __future__ import annotations

import json

import pytest

from denoiselab.evaluation.records import Number, count_name


@pytest.mark.parametrize(
    ("count", "name"), [(4, "4"), (500, "500"), (1000, "1k"), (1500, "1500"), (2000, "2k"), (50000, "50k")]
)
def test_count_name(count, name):
    assert count_name(count) == name


def test_a_number_survives_json():
    number = Number("fd_digits_500", 0.2, None, {"count": 500, "sampler": {"name": "heun"}})
    assert Number.from_dict(json.loads(json.dumps(number.to_dict()))) == number


@pytest.mark.parametrize("change", [{"name": "x"}, {"name": "x", "value": 1.0, "floor": None, "protocol": {}, "y": 1}])
def test_a_record_with_other_keys_is_refused(change):
    with pytest.raises(ValueError, match="must have the keys name, value, floor, protocol"):
        Number.from_dict(change)
