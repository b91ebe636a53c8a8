from __future__ import annotations

import json

import pytest

from denoiselab.runs.sweep_folder import membership


def job(root, sweep, told):
    run = root / "0_seed=1"
    run.mkdir()
    for path, content in ((root / "sweep.json", sweep), (run / "job.json", told)):
        if content is not None:
            path.write_text(content)
    return run


def test_a_job_knows_its_sweep(tmp_path):
    run = job(tmp_path, json.dumps({"name": "objectives", "jobs": []}), json.dumps({"number": 0, "name": "seed=1"}))
    assert membership(run) == ("objectives", "seed=1")


@pytest.mark.parametrize(
    ("sweep", "told"),
    [
        (None, None),
        ('{"name": "a"}', None),
        (None, '{"name": "b"}'),
        ('{"name": "a"', '{"name": "b"}'),
        ('{"name": 3}', '{"name": "b"}'),
        ('["name"]', '{"name": "b"}'),
        ('{"name": "a"}', '{"name": ""}'),
    ],
)
def test_a_run_that_is_in_none_goes_on_alone(tmp_path, sweep, told):
    assert membership(job(tmp_path, sweep, told)) is None
