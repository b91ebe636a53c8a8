"""Reading what runs left, refusing unlike protocols, and naming rows by what differs."""

from __future__ import annotations

import json
import os

import pytest

from denoiselab.reports.measured_runs import UnlikeError, check_protocols, identity, read_all, row_names
from stand_in_runs import PROTOCOL, number, write_run


def names(*runs, vary=()):
    by_hand = {o.partition("=")[0] for run in runs for o in run.overrides}
    return row_names([identity(run, vary) for run in runs], by_hand, vary)


def read(*paths):
    runs, notes = read_all(paths)
    assert not notes
    return runs


# --- reading ---


def test_the_last_step_counts_and_a_line_that_was_written_twice_once(tmp_path):
    early, twice = {"protocol": {"step": 800}}, number("fid_2k", 3.0)
    run = write_run(tmp_path / "a", number("fid_500", 9.0, **early), number("fid_2k", 8.0, **early), twice, twice)
    (measured,) = read(run)
    assert {name: n.value for name, n in measured.numbers.items()} == {"fid_2k": 3.0}
    assert (measured.label, measured.seed) == ("a", 0)


def test_an_evaluation_file_belongs_to_its_run(tmp_path):
    run = write_run(tmp_path / "a", seed=3)
    file = run / "evaluations" / "step.json"
    file.parent.mkdir()
    file.write_text(json.dumps({"numbers": [number("fid_2k", 3.0).to_dict()], "seconds": {}}))
    (measured,) = read(file)
    assert (measured.seed, measured.label) == (3, str(file))
    assert measured.choices["objective"] == "v"


def test_what_cannot_be_read_is_one_line_each_with_file_and_line(tmp_path):
    good = json.dumps(number("fid_2k", 3.0).to_dict())
    run = write_run(tmp_path / "a")
    (run / "metrics.jsonl").write_text(f'{good}\n{good[:50]}\n5\n{{"name": "x"}}\n')
    empty, none = write_run(tmp_path / "b"), tmp_path / "c"
    none.mkdir()
    (tmp_path / "d.json").write_text("[]")
    runs, notes = read_all([run, empty, none, tmp_path / "d.json"])
    assert [r.label for r in runs] == ["a"]
    assert notes == [
        f"{run}/metrics.jsonl:2: is damaged; left out",
        f"{run}/metrics.jsonl:3: is damaged; left out",
        f"{run}/metrics.jsonl:4: is damaged; left out",
        f"{empty}/metrics.jsonl: holds no numbers; left out",
        f"{none}/metrics.jsonl: there is none; measure with evaluate.py run={none}, and compare the file it writes",
        f"{tmp_path / 'd.json'}: is no file of numbers that evaluate.py wrote",
    ]


def test_runs_of_one_name_are_called_by_their_paths(tmp_path):
    runs = read(*(write_run(tmp_path / sweep / "run", number("fid_2k", 1.0)) for sweep in ("x", "y")))
    assert [run.label for run in runs] == [str(tmp_path / "x" / "run"), str(tmp_path / "y" / "run")]


# --- unlike protocols ---


def two(tmp_path, change, name="fd_digits_500"):
    """Two runs of which the second has another protocol."""
    first, second = number(name, 1.0), number(name, 1.0, protocol=change)
    return read(write_run(tmp_path / "run_a", first), write_run(tmp_path / "run_b", second))


STEPS = {"sampler": PROTOCOL["sampler"] | {"nfe": 50}, "nfe": 49}
DDIM = {"sampler": PROTOCOL["sampler"] | {"_target_": "lab.samplers.DDIM"}, "nfe": 20}


def test_the_refusal_names_field_values_runs_and_the_way_out(tmp_path):
    with pytest.raises(UnlikeError) as caught:
        check_protocols(two(tmp_path, STEPS), [])
    assert str(caught.value) == (
        "fd_digits_500: sampler.nfe differs: 20 in run_a, 50 in run_b; compare like with like, or allow it with "
        "vary=[sampler]"
    )


@pytest.mark.parametrize(
    ("change", "said", "vary"),
    [
        (DDIM, "sampler differs: HeunT in run_a, DDIM in run_b", "sampler"),
        ({"step": 800}, "step differs: 1600 in run_a, 800 in run_b", "step"),
        ({"weights": "raw"}, "weights differs: ema in run_a, raw in run_b", "weights"),
        ({"clip": True}, "clip differs: not said in run_a, true in run_b", "clip"),
        ({"step": 800, "weights": "raw"}, "weights differs: ema in run_a, raw in run_b", "weights,step"),
        ({"measure": {"name": "Frechet", "k": 3}}, "measure.k differs: not said in run_a, 3 in run_b", "measure"),
        (
            {"sampler": PROTOCOL["sampler"] | {"_target_": "mine.HeunT"}},
            "sampler differs: HeunT in run_a, HeunT in run_b",
            "sampler",
        ),
    ],
)
def test_each_unlike_field_is_refused_until_it_is_allowed(tmp_path, change, said, vary):
    runs = two(tmp_path, change)
    with pytest.raises(UnlikeError) as caught:
        check_protocols(runs, [])
    assert said in str(caught.value)
    assert str(caught.value).endswith(f"vary=[{vary}]")
    check_protocols(runs, vary.split(","))


@pytest.mark.parametrize("change", [{"weights_sha256": "x"}, {"seed": 4}, {"checkpoint": "elsewhere"}])
def test_what_says_which_model_was_measured_may_differ(tmp_path, change):
    check_protocols(two(tmp_path, change), [])


def test_the_cost_of_a_sample_goes_with_the_sampler_and_other_fields_do_not(tmp_path):
    runs = two(tmp_path, STEPS)
    for vary in (["sampler"], ["sampler.nfe"], ["nfe"]):
        check_protocols(runs, vary)
    with pytest.raises(UnlikeError, match=r"vary=\[guidance,sampler\]"):
        check_protocols(runs, ["guidance"])
    with pytest.raises(ValueError, match="vary=samplers: must be a field of the protocols: class_balance, count, "):
        check_protocols(runs, ["samplers"])


def test_other_columns_may_have_other_protocols(tmp_path):
    one = number("fd_digits_500", 1.0)
    other = number("fd_digits_2k", 1.0, protocol={"count": 5})
    check_protocols(read(write_run(tmp_path / "a", one), write_run(tmp_path / "b", other)), [])


# --- names ---


def test_rows_are_named_by_what_differs(tmp_path):
    fid = number("fid_2k", 1.0)
    runs = read(
        write_run(tmp_path / "a", fid, objective="v", trainer={"devices": 8}),
        write_run(tmp_path / "b", fid, objective="epsilon", seed=7, logger={"tags": ["x"]}),
    )
    assert names(*runs) == ["objective=v", "objective=epsilon"]
    assert identity(runs[0], ()) | {"objective": "epsilon"} == identity(runs[1], ())


def test_what_was_set_by_hand_is_named_and_what_follows_from_it_is_not(tmp_path):
    fid = number("fid_2k", 1.0)
    longer = {"trainer": {"max_steps": 3200}, "schedule": {"steps": 3200}}
    shorter = {"trainer": {"max_steps": 1600}, "schedule": {"steps": 1600}}
    by_hand = ["objective=v", "trainer.max_steps=3200"]
    runs = read(
        write_run(tmp_path / "a", fid, objective="epsilon", **shorter),
        write_run(tmp_path / "b", fid, objective="v", overrides=by_hand, **longer),
    )
    assert names(*runs) == ["objective=epsilon, max_steps=1600", "objective=v, max_steps=3200"]


def test_floats_are_short_and_ambiguous_keys_whole(tmp_path):
    fid = number("fid_2k", 1.0)
    runs = read(
        write_run(tmp_path / "a", fid, optimizer={"lr": 5e-4}, overrides=["optimizer.lr=5e-4"]),
        write_run(tmp_path / "b", fid, optimizer={"lr": 1e-3}),
    )
    assert names(*runs) == ["lr=0.0005", "lr=0.001"]
    both = row_names([{"a.lr": 1, "b.lr": 1}, {"a.lr": 1, "b.lr": 2}, {"a.lr": 2, "b.lr": 2}], (), ())
    assert both == ["a.lr=1, b.lr=1", "a.lr=1, b.lr=2", "a.lr=2, b.lr=2"]


def test_what_may_vary_becomes_part_of_the_name(tmp_path):
    runs = two(tmp_path, STEPS)
    assert names(*runs, vary=["sampler"]) == ["nfe=19", "nfe=49"]
    assert names(*two(tmp_path / "more", DDIM), vary=["sampler"]) == ["sampler=HeunT", "sampler=DDIM"]


def test_what_may_vary_is_named_also_where_it_follows_from_the_config(tmp_path):
    runs = read(
        write_run(tmp_path / "a", number("fid_2k", 1.0), objective="v"),
        write_run(tmp_path / "b", number("fid_2k", 1.0, protocol=DDIM), objective="epsilon"),
    )
    assert names(*runs, vary=["sampler"]) == ["objective=v, sampler=HeunT", "objective=epsilon, sampler=DDIM"]


# --- folders of somebody else's ---


@pytest.mark.parametrize("value", ["[" * 100_000, '{"a":' * 900 + "1" + "}" * 900, '{"name": [3]}', "\x1b[2J"])
def test_lines_that_nobody_measured_are_left_out(tmp_path, value):
    run = write_run(tmp_path / "a", number("fid_2k", 3.0), number("fid_2k", 4.0, protocol={"step": 800}))
    with (run / "metrics.jsonl").open("a") as file:
        file.write(f"{value}\n")
    runs, notes = read_all([run])
    assert notes == [f"{run}/metrics.jsonl:3: is damaged; left out"]
    assert [n.value for n in runs[0].numbers.values()] == [3.0]


def test_pipes_are_not_waited_for(tmp_path):
    run = write_run(tmp_path / "a", number("fid_2k", 3.0))
    for name in ("config.json", "command.json"):
        (run / name).unlink()
        os.mkfifo(run / name)
    (measured,) = read(run)
    assert (measured.config, measured.choices, measured.overrides, measured.seed) == ({}, {}, [], None)
    (run / "metrics.jsonl").unlink()
    os.mkfifo(run / "metrics.jsonl")
    runs, notes = read_all([run])
    assert not runs
    assert notes == [f"{run}/metrics.jsonl: cannot be read (is no regular file); left out"]


@pytest.mark.parametrize("config", ["[" * 100_000, "[]", "{"])
def test_a_config_that_cannot_be_read_is_as_if_it_were_not_there(tmp_path, config):
    run = write_run(tmp_path / "a", number("fid_2k", 3.0))
    (run / "config.json").write_text(config)
    (measured,) = read(run)
    assert measured.config == {}


@pytest.mark.parametrize(
    ("command", "choices", "overrides"),
    [
        ({"choices": [1], "overrides": 3}, {}, []),
        ({"choices": {"a": [1], "b": "c"}, "overrides": [1, 2, "a=1"]}, {"b": "c"}, ["a=1"]),
        ({}, {}, []),
    ],
)
def test_of_a_command_only_text_is_taken(tmp_path, command, choices, overrides):
    run = write_run(tmp_path / "a", number("fid_2k", 3.0), seed=[1])
    (run / "command.json").write_text(json.dumps(command))
    (measured,) = read(run)
    assert (measured.choices, measured.overrides, measured.seed) == (choices, overrides, None)
    assert names(measured, measured) == ["", ""]
