from __future__ import annotations

import json

import pytest

from denoiselab.evaluation.records import Number, base_name, count_name, protocol_id, sampling_protocol


@pytest.mark.parametrize(
    ("count", "name"), [(4, "4"), (500, "500"), (1000, "1k"), (1500, "1500"), (2000, "2k"), (50000, "50k")]
)
def test_count_name(count, name):
    assert count_name(count) == name


def test_a_number_survives_json():
    protocol = {"count": 500, "sampler": {"name": "heun"}}
    for number in (
        Number("fd_digits_500", 0.2, None, protocol),
        Number("fd_inf_digits_500", 0.2, 0.1, protocol, interval=(0.1, 0.3), jackknife=[0.19, 0.21]),
    ):
        assert Number.from_dict(json.loads(json.dumps(number.to_dict()))) == number


def test_names():
    assert base_name("fid", "", "fd") == "fid"
    assert base_name("fid", "digits", "fd") == "fd_digits"
    assert base_name("precision", "digits") == "precision_digits"


def test_the_id_of_a_protocol_is_about_how_and_not_about_which_model():
    protocol = {"sampler": {"nfe": 20}, "count": 500, "step": 100, "weights_sha256": "a"}
    same = {"count": 500, "step": 200, "weights_sha256": "b", "sampler": {"nfe": 20}}
    assert protocol_id(protocol) == protocol_id(same)
    assert protocol_id(protocol) != protocol_id(protocol | {"sampler": {"nfe": 50}})
    assert protocol_id(protocol) != protocol_id(protocol | {"count": 501})
    assert len(protocol_id(protocol)) == 8


def test_a_budget_and_the_steps_that_it_buys_are_one_protocol():
    def protocol(nfe, steps, spent):
        config = {"sampler": {"_target_": "Heun", "nfe": nfe, "steps": steps}, "guidance": {}}
        return sampling_protocol(config, weights="ema", weights_sha256="a", step=1, seed=0, nfe=spent)

    assert protocol(20, None, 19) == protocol(None, 10, 19)
    assert protocol(20, None, 19) != protocol(None, 11, 21)
    adaptive = {"sampler": {"rtol": 0.1}, "guidance": {}}
    assert sampling_protocol(adaptive, weights="ema", weights_sha256="a", step=1, seed=0, nfe=None)["sampler"] == {
        "rtol": 0.1
    }


WHOLE = {"name": "x", "value": 1.0, "floor": None, "protocol": {}, "interval": None, "jackknife": None}


@pytest.mark.parametrize("change", [{"name": "x"}, WHOLE | {"y": 1}])
def test_a_record_with_other_keys_is_refused(change):
    with pytest.raises(ValueError, match="must have the keys name, value, floor, protocol"):
        Number.from_dict(change)


def test_a_record_of_an_earlier_version_has_no_interval():
    early = {key: WHOLE[key] for key in ("name", "value", "floor", "protocol")}
    assert Number.from_dict(early) == Number("x", 1.0, None, {})


@pytest.mark.parametrize(
    ("key", "value"),
    [
        *[("name", name) for name in (3, [3], "", "\x1b[2J", "x" * 201)],
        *[("value", value) for value in (None, "1", True, 10**400, [1.0])],
        *[("floor", value) for value in ("ab", [], True, 10**400)],
        *[("interval", value) for value in ("ab", [1.0], [1.0, "2"], {"a": 1, "b": 2}, [])],
        *[("jackknife", value) for value in ("ab", [1.0, None], 3)],
        *[("protocol", value) for value in (None, [], {"step": "x"}, {"step": [1]}, {"step": True}, {"step": 1.5})],
        *[("protocol", value) for value in ({"seed": [1]}, {"count": "x"}, {"weights": ["ema"]}, {"weights": 1})],
    ],
)
def test_a_record_with_values_of_other_kinds_is_refused(key, value):
    with pytest.raises(ValueError, match=f"^number.{key}=.*: is not what a measurement has there$"):
        Number.from_dict(WHOLE | {key: value})


@pytest.mark.parametrize("value", [None, 3, "x", [WHOLE]])
def test_what_is_no_record_is_refused(value):
    with pytest.raises(ValueError, match="^number: must be a mapping$"):
        Number.from_dict(value)
