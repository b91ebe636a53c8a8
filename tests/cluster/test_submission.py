"""What is submitted, resumed and said of jobs, with stand-ins for Slurm's commands."""

from __future__ import annotations

import json
from dataclasses import replace

import pytest

from denoiselab.app.cluster import SLURM_KEYS, check_settings, note_typed, resume_submitted, submit_jobs
from denoiselab.app.sweep import sweep as sweep_action
from denoiselab.runs.errors import ConfigError
from denoiselab.runs.sweep_folder import add_jobs, make_sweep, read_jobs, read_sweep, write_status

SETTINGS = dict.fromkeys(SLURM_KEYS) | {
    "root": "sweeps",
    "dry_run": False,
    "time": "24:00:00",
    "signal_seconds": 120,
    "requeues": 100,
    "freeze": False,
}
KEPT = {key: value for key, value in SETTINGS.items() if key not in ("folder", "root", "dry_run")}
LINEAR = {"_target_": "torch.nn.Linear", "in_features": 1, "out_features": 1}


@pytest.fixture
def sweep(tmp_path, monkeypatch):
    """A sweep of three jobs, of which the last has two nodes, and commands of Slurm that note how they were called."""
    monkeypatch.setenv("DENOISELAB_CACHE", str(tmp_path / "cache"))
    monkeypatch.setenv("PATH", f"{tmp_path}/bin:/usr/bin:/bin")
    (tmp_path / "bin").mkdir()
    note_typed(KEPT)
    what = {"command": [], "launcher": {"kind": "slurm", **KEPT}, "directory": str(tmp_path)}
    made = make_sweep(tmp_path, tmp_path / "sweep", "x", what)
    composed = [
        ({"trainer": {"accelerator": "cpu", "devices": 1, "num_nodes": nodes}}, {}, [f"seed={seed}"])
        for seed, nodes in enumerate((1, 1, 2))
    ]
    made, _ = add_jobs(made, [[f"seed={seed}"] for seed in range(3)], composed)
    says(tmp_path, "sbatch", 'cat > /dev/null; n=$(grep -c "^sbatch" "$ASKED"); echo $((50 + n))')
    says(tmp_path, "scontrol", "")
    says(tmp_path, "scancel", "")
    says(tmp_path, "squeue", "")
    return made


def says(folder, name, body):
    """Have a command do something, once it has noted how it was called."""
    file = folder / "bin" / name
    file.write_text(f'#!/bin/bash\nASKED="{folder}/asked"\necho "{name} $*" >> "$ASKED"\n{body}\n')
    file.chmod(0o755)


def asked(folder):
    return (folder / "asked").read_text().splitlines() if (folder / "asked").exists() else []


def at_work(sweep, *states):
    for number, (job, state) in enumerate(zip(read_jobs(sweep), states, strict=True)):
        write_status(job.folder, replace(job.status, state=state, attempts=1, cluster_job=f"51_{number}"))


def states(sweep):
    return [job.status.state for job in read_jobs(sweep)]


def act(action, sweep):
    options = {"action": action, "folder": str(sweep.folder), "jobs": None, "failed": True, "code": "then", "trust": []}
    sweep_action(options, {}, [])


def test_what_begins_at_once_keeps_its_state(sweep, tmp_path):
    """Jobs are held until they are written down: here they end as they are released."""
    done = "\n".join(f"""sed -i 's/"queued"/"finished"/' {job.folder}/status.json""" for job in read_jobs(sweep))
    says(tmp_path, "scontrol", done)
    submit_jobs(sweep, read_jobs(sweep), SETTINGS)
    assert states(sweep) == ["finished"] * 3
    assert [job.status.cluster_job for job in read_jobs(sweep)] == ["51_0", "51_1", "52_2"]
    assert asked(tmp_path) == ["sbatch --parsable --hold"] * 2 + ["scontrol release 51,52"]


def test_of_jobs_that_are_partly_refused_none_is_left(sweep, tmp_path):
    refuses = '[ $n = 1 ] || { echo "sbatch: error: too many nodes" >&2; exit 1; }; echo 51'
    says(tmp_path, "sbatch", f'cat > /dev/null; n=$(grep -c "^sbatch" "$ASKED"); {refuses}')
    with pytest.raises(ConfigError, match="too many nodes"):
        submit_jobs(sweep, read_jobs(sweep), SETTINGS)
    assert asked(tmp_path)[-1] == "scancel 51"
    assert not any(line.startswith("scontrol") for line in asked(tmp_path))


@pytest.mark.parametrize("action", ["status", "collect", "resume"])
def test_where_the_queue_is_not_known_nothing_is_written_or_submitted(action, sweep, tmp_path):
    at_work(sweep, "running", "queued", "preempted")
    says(tmp_path, "squeue", 'echo "slurm_load_jobs error: Unable to contact slurm controller" >&2; exit 1')
    with pytest.raises(ConfigError, match="Unable to contact slurm controller"):
        act(action, sweep)
    assert states(sweep) == ["running", "queued", "preempted"]
    assert not any(line.startswith("sbatch") for line in asked(tmp_path))


def test_where_there_is_no_slurm_the_files_have_the_word(sweep, tmp_path, monkeypatch, capsys):
    at_work(sweep, "running", "queued", "finished")
    monkeypatch.setenv("PATH", str(tmp_path / "nothing"))
    act("status", sweep)
    assert states(sweep) == ["running", "queued", "finished"]
    assert "there is no squeue here" in capsys.readouterr().out
    with pytest.raises(ConfigError, match="there is no sbatch here"):
        act("resume", sweep)


def test_status_writes_only_what_is_over(sweep, tmp_path, capsys):
    at_work(sweep, "preempted", "running", "running")
    says(tmp_path, "squeue", 'printf "51_0|PENDING\\n51_1|COMPLETING\\n51_2|NODE_FAIL\\n"')
    act("status", sweep)
    assert states(sweep) == ["preempted", "running", "failed"]
    assert "queued" in capsys.readouterr().out


@pytest.mark.parametrize("state", ["PENDING", "RUNNING", "CONFIGURING", "REQUEUE_HOLD", "SUSPENDED", "SOMETHING_NEW"])
def test_what_is_in_the_queue_is_not_submitted_again(state, sweep, tmp_path):
    at_work(sweep, "running", "running", "running")
    says(tmp_path, "squeue", f'printf "51_0|{state}\\n51_1|CANCELLED\\n51_2|{state}\\n"')
    act("resume", sweep)
    assert [job.status.cluster_job for job in read_jobs(sweep)] == ["51_0", "51_1", "51_2"]
    assert states(sweep) == ["running", "queued", "running"]
    assert len([line for line in asked(tmp_path) if line.startswith("sbatch")]) == 1


def test_what_was_just_cancelled_is_waited_for(sweep, tmp_path):
    at_work(sweep, "preempted", "finished", "finished")
    says(
        tmp_path,
        "squeue",
        'n=$(grep -c "^squeue" "$ASKED"); [ $n = 1 ] && echo "51_0|COMPLETING" || echo "51_0|CANCELLED"',
    )
    act("resume", sweep)
    assert [line.split()[0] for line in asked(tmp_path)] == ["squeue", "squeue", "sbatch", "scontrol"]


def test_a_config_of_a_folder_is_checked_before_it_is_submitted_and_again_by_its_job(sweep, tmp_path):
    (job, *_) = read_jobs(sweep)
    foreign = replace(job, config=job.config | {"backbone": LINEAR})
    with pytest.raises(ConfigError, match=r"backbone\._target_=torch\.nn\.Linear: is not trusted"):
        resume_submitted(sweep, [foreign], [])
    assert asked(tmp_path) == []
    resume_submitted(sweep, [foreign], ["torch.nn"])
    assert '--stay --trust torch.nn "$folder"' in (sweep.folder / "slurm" / "0.sh").read_text()
    resume_submitted(sweep, [job], [])
    assert "--stay --trust '' \"$folder\"" in (sweep.folder / "slurm" / "1.sh").read_text()


@pytest.mark.parametrize(
    ("settings", "words"),
    [
        ({"environment": {"WANDB_API_KEY": "sentinel-0123"}}, "environment.WANDB_API_KEY: holds a secret"),
        ({"prologue": ["module load cuda", "export HF_TOKEN=sentinel-0123"]}, "prologue: holds a secret"),
        ({"prologue": ["export HF_TOKEN=***"]}, "prologue: holds a secret"),
        ({"container": "docker run -e DB_PASSWORD=sentinel-0123 x"}, "container: holds a secret"),
        ({"options": {"comment": "of-the-environment-sentinel-0123"}}, "options.comment: holds a secret"),
        ({"options": {"nodes": 2}}, r"options.nodes: is not for options to say; trainer.num_nodes does"),
        ({"options": {"requeue": False}}, r"options.requeue: is not for options to say"),
        ({"time": 2}, "time=2: must be more than 240 s"),
        ({"time": "4:00"}, "time=4:00: must be more than 240 s"),
    ],
)
def test_what_launchers_may_not_say(settings, words, monkeypatch):
    monkeypatch.setenv("HF_TOKEN", "of-the-environment-sentinel-0123")
    with pytest.raises(ConfigError, match=f"hydra.launcher.{words}") as raised:
        check_settings(SETTINGS | settings)
    assert "sentinel" not in str(raised.value)
    assert "\n" not in str(raised.value)


@pytest.mark.parametrize(
    "settings",
    [
        {"environment": {"NCCL_DEBUG": "INFO"}, "prologue": ["module load cuda", "source ~/.secrets"]},
        {"time": "4:01", "options": {"exclusive": True, "constraint": "a100"}},
        {"time": None},
    ],
)
def test_what_launchers_may_say(settings):
    check_settings(SETTINGS | settings)


def test_no_secret_of_the_environment_is_in_what_is_written(sweep, tmp_path, monkeypatch):
    monkeypatch.setenv("WANDB_API_KEY", "of-the-environment-sentinel-0123")
    monkeypatch.setenv("HF_TOKEN", "another-sentinel-0123")
    submit_jobs(sweep, read_jobs(sweep), SETTINGS)
    files = [path for path in sweep.folder.rglob("*") if path.is_file()]
    assert {path.suffix for path in files} >= {".sh", ".json"}
    assert not [path for path in files if "sentinel" in path.read_text()]
    assert json.loads((sweep.folder / "sweep.json").read_text())["launcher"]["kind"] == "slurm"
    assert read_sweep(sweep.folder).jobs
