"""Jobs of a sweep as arrays of Slurm: scripts, submission, and what the queue says of them.

A script starts one process for each rank with srun, all of which Slurm sends the signal some time before the limit: they save
and end with code 75, and the script, which alone does so, puts its own task into the queue again; likewise where a job that
is pre-empted is told so and given time. Slurm itself does so where it ends such a job at once, or a node fails. Either way
the task goes on in the same folder. `scancel` ends the script at once, so what is cancelled stays cancelled.
"""

from __future__ import annotations

import os
import re
import shlex
import shutil
import subprocess
import sys
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from denoiselab.runs.errors import REQUEUE, ConfigError
from denoiselab.runs.frozen_code import frozen
from denoiselab.runs.local_jobs import Slot, job_environment
from denoiselab.runs.secrets import is_secret_name
from denoiselab.runs.sweep_folder import LOG, STATUS, Job, Sweep

ATTEMPT = "DENOISELAB_SLURM_ATTEMPT"  # variable of a batch script: tells this start of its task from others
FAILED = ".failed"  # a file in a job's folder: the attempt in which a rank has failed, and why
SCRIPTS = "slurm"  # the folder of scripts in that of a sweep
SECONDS = 60  # that a command of Slurm may take
PORTS = 5_000  # ports from 20000, one for each job on a machine
WAIT = 7200  # seconds that srun leaves the ranks of a job after the first has ended: rank 0 may have much to send
# All other states, also those of a later Slurm, are of tasks that have begun or will.
OVER = (
    "COMPLETED",
    "CANCELLED",
    "FAILED",
    "TIMEOUT",
    "PREEMPTED",
    "NODE_FAIL",
    "BOOT_FAIL",
    "DEADLINE",
    "OUT_OF_MEMORY",
)
UNKNOWN_JOB = "Invalid job id specified"
REFUSED = re.compile(r"(?:sbatch|allocation failure): (?:error: )?(.*)")


@dataclass(frozen=True)
class Shape:
    """What a job occupies.

    Args:
        nodes: machines.
        tasks: processes on each, one device each.
        gpu: whether the devices are GPUs.
    """

    nodes: int
    tasks: int
    gpu: bool


def shape_of(config: Mapping[str, Any], settings: Mapping[str, Any]) -> Shape:
    """What a job occupies, as its config and the launcher's settings agree.

    Raises:
        ConfigError: if they do not, with what to change.
    """
    trainer = config["trainer"]
    nodes, devices = trainer["num_nodes"], trainer["devices"]
    gpu = trainer["accelerator"] == "gpu" or (trainer["accelerator"] == "auto" and settings["gpus_per_node"] != 0)
    asked_nodes, asked_gpus = settings["nodes"], settings["gpus_per_node"]
    if asked_nodes is not None and asked_nodes != nodes:
        raise ConfigError(
            f"hydra.launcher.nodes={asked_nodes}: but trainer.num_nodes={nodes}; say trainer.num_nodes={asked_nodes}, or "
            "leave hydra.launcher.nodes out"
        )
    if devices == "auto":
        if gpu and asked_gpus is None:
            raise ConfigError(
                "trainer.devices=auto: say how many GPUs a node has for it, hydra.launcher.gpus_per_node=8"
            )
        devices = asked_gpus if gpu else 1
    if gpu and asked_gpus is not None and asked_gpus != devices:
        raise ConfigError(
            f"hydra.launcher.gpus_per_node={asked_gpus}: but trainer.devices={devices}; say trainer.devices={asked_gpus}, or "
            "leave hydra.launcher.gpus_per_node out"
        )
    if not gpu and asked_gpus:
        raise ConfigError(f"hydra.launcher.gpus_per_node={asked_gpus}: but trainer.accelerator=cpu; say trainer=ddp")
    return Shape(nodes, devices, gpu)


def script(
    sweep: Sweep,
    shape: Shape,
    numbers: Sequence[int],
    settings: Mapping[str, Any],
    trust: Sequence[str] | None = None,
) -> str:
    """The batch script of the jobs of one shape.

    Args:
        sweep: that they belong to.
        shape: of each.
        numbers: of the jobs, which are those of the tasks of the array.
        settings: of the launcher.
        trust: as in `job_command`.
    """
    most = f"%{settings['at_once']}" if settings["at_once"] else ""
    gpus = shape.tasks if shape.gpu else None
    options = {
        "job-name": re.sub(r"[^\w.+-]", "-", f"denoiselab-{sweep.folder.name}")[:100],
        "array": ",".join(map(str, numbers)) + most,
        "nodes": shape.nodes,
        "ntasks-per-node": shape.tasks,
        "gpus-per-node": gpus,
        "cpus-per-task": settings["cpus_per_task"],
        "mem": settings["mem"],
        "time": settings["time"],
        "partition": settings["partition"],
        "account": settings["account"],
        "qos": settings["qos"],
        "output": sweep.folder / SCRIPTS / "%A_%a.log",
        "open-mode": "append",
        "signal": f"USR1@{settings['signal_seconds']}",
        **(settings["options"] or {}),
    }
    lines = [
        f"#SBATCH --{key}" if value is True else f'#SBATCH --{key}="{value}"'
        for key, value in options.items()
        if value is not None and value is not False
    ]
    code = None if sweep.code is None else str(frozen(sweep.code).absolute())
    container = f"{settings['container']} " if settings["container"] else ""
    # -P: the folder that it is started in does not come before the code of the sweep
    python = container + shlex.join(
        [settings["python"] or sys.executable, "-P", "-m", "denoiselab.app.sweep_job", "--stay"]
    )
    how = [] if trust is None else ["--trust", ",".join(trust)]
    how += [] if code is None else ["--code", code]
    exports = [f"export {key}={shlex.quote(str(value))}" for key, value in (settings["environment"] or {}).items()]
    if code is not None:
        exports.append(f'export PYTHONPATH={shlex.quote(code)}"${{PYTHONPATH:+:$PYTHONPATH}}"')
    log = f"{SCRIPTS}/${{SLURM_ARRAY_JOB_ID}}_${{SLURM_ARRAY_TASK_ID}}.log"
    return "\n".join(
        [
            "#!/bin/bash",
            *lines,
            "#SBATCH --requeue",
            "",
            f'folder=$(echo {shlex.quote(str(sweep.folder))}/"${{SLURM_ARRAY_TASK_ID}}"_*)',
            "conclude() {  # EXIT_CODE WHY: the job has failed, and may not be able to say so",
            f'  {python} --conclude "$1" --because "$2" "$folder"',
            "}",
            'trap \'code=$?; if [ -z "${begun-}" ] && [ $code -lt 128 ]; then'
            f' conclude $((code ? code : 1)) "its script ended before the run began: see {log}"; fi\' EXIT',
            f"cd {shlex.quote(sweep.directory)} || exit 1",
            *(settings["prologue"] or []),
            "set +eu",
            *exports,
            'export MASTER_ADDR=${MASTER_ADDR:-$(scontrol show hostnames "$SLURM_JOB_NODELIST" | head -n 1)}',
            f"export MASTER_PORT=$((20000 + SLURM_JOB_ID % {PORTS}))",
            f"export {ATTEMPT}=$SLURM_JOB_ID.${{SLURM_RESTART_COUNT:-0}}",
            f'rm -f "$folder/{FAILED}"',
            'if [ -n "$SLURM_CPUS_PER_TASK" ]; then export SRUN_CPUS_PER_TASK=$SLURM_CPUS_PER_TASK; fi',
            "",
            "begun=1",
            f'srun --kill-on-bad-exit=0 --wait={WAIT} --output="$folder/{LOG}" --open-mode=append \\',
            "  " + " ".join([python, *([shlex.join(how)] if how else []), '"$folder"']),
            "code=$?",
            f'if [ $code -ne 0 ] && [ $code -ne {REQUEUE} ]; then conclude $code ""; fi',
            "# It was told to stop, has saved, and goes on when Slurm has room for it, unless it gets nowhere. TERM must not",
            "# be trapped here: whoever cancels the job would otherwise see it again.",
            f'if [ $code -eq {REQUEUE} ] && [ "${{SLURM_RESTART_COUNT:-0}}" -lt {settings["requeues"]} ] &&',
            f'  ! grep -qs \'"state": "failed"\' "$folder/{STATUS}"; then',
            '  scontrol requeue "${SLURM_ARRAY_JOB_ID}_${SLURM_ARRAY_TASK_ID}"',
            "fi",
            "exit $code",
            "",
        ]
    )


def seconds_of(limit: int | str | None) -> int | None:
    """A time limit in Slurm's words, [days-]hours:minutes:seconds and their shorter forms, a number alone being minutes.

    None if there is none, or in other words, which Slurm itself judges.
    """
    found = re.fullmatch(r"(?:(\d+)-)?(\d+)(?::(\d+))?(?::(\d+))?", str(limit).strip())
    if found is None:
        return None
    days, *numbers = found.groups()
    given = [int(number) for number in numbers if number is not None]
    units = (3600, 60, 1) if days is not None or len(given) == 3 else (60, 1)
    return int(days or 0) * 86400 + sum(n * unit for n, unit in zip(given, units, strict=False)) or None


def check_sbatch() -> None:
    """See to it that there is a Slurm to submit to.

    Raises:
        ConfigError: otherwise.
    """
    if shutil.which("sbatch") is None:
        raise ConfigError("hydra/launcher=slurm: there is no sbatch here; start it on a login node of a Slurm cluster")


def try_out(text: str) -> None:
    """Have Slurm look at a script, without submitting it.

    Raises:
        ConfigError: if it would not take it, in Slurm's words.
    """
    _sbatch(text, "--test-only")


def submit(text: str) -> str:
    """Submit a script, held until it is released; the number of its array.

    Raises:
        ConfigError: if Slurm does not take it.
    """
    return _sbatch(text, "--parsable", "--hold").strip().partition(";")[0]


def ask(*line: str) -> str:
    """What a command of Slurm prints.

    Raises:
        ConfigError: if it fails, in its words.
    """
    try:
        done = subprocess.run(line, capture_output=True, text=True, timeout=SECONDS)
    except (OSError, subprocess.TimeoutExpired) as error:
        raise ConfigError(f"{line[0]} does not answer ({error})") from error
    if done.returncode:
        raise ConfigError(f"{line[0]} {line[-1]}: {' '.join(done.stderr.split())}")
    return done.stdout


def _sbatch(text: str, *options: str) -> str:
    """sbatch, without this process's secrets, which Slurm would store with the job."""
    environment = {key: value for key, value in job_environment(os.environ, Slot()).items() if not is_secret_name(key)}
    try:
        done = subprocess.run(
            ["sbatch", *options], input=text, capture_output=True, text=True, timeout=SECONDS, env=environment
        )
    except (OSError, subprocess.TimeoutExpired) as error:
        raise ConfigError(f"hydra/launcher=slurm: sbatch does not answer ({error})") from error
    if done.returncode:
        said = [match[1] for line in done.stderr.splitlines() if (match := REFUSED.match(line))]
        raise ConfigError(f"hydra/launcher=slurm: sbatch refuses: {'; '.join(said) or done.stderr.strip()}")
    return done.stdout


def hidden_variables() -> list[str]:
    """Secrets of this process's environment that jobs will not have."""
    return sorted(key for key in os.environ if is_secret_name(key))


def in_queue(tasks: Sequence[str]) -> dict[str, str]:
    """What Slurm says of tasks such as "51_0", for as long as it remembers them, in its words (PENDING, RUNNING).

    Raises:
        ConfigError: if there is no Slurm here, or it does not answer: nothing is known then.
    """
    arrays = sorted({task.partition("_")[0] for task in tasks})
    if not arrays:
        return {}
    try:
        said = ask("squeue", "-h", "-r", "-t", "all", "-o", "%i|%T", "-j", ",".join(arrays))
    except ConfigError as error:
        if UNKNOWN_JOB in str(error):
            return {}
        raise
    found = (row.partition("|") for row in said.splitlines())
    return {task: state for task, _, state in found if task in tasks}


def watch_lines(sweep: Sweep, arrays: Sequence[str], jobs: Sequence[Job]) -> list[str]:
    """How to look at what was submitted."""
    return [
        f"slurm  {', '.join(arrays)} ({len(jobs)} jobs)",
        f"watch  squeue -j {','.join(arrays)}",
        f"       python scripts/sweep.py status {sweep.folder}",
        f"       tail -F {jobs[0].folder / LOG}",
        f"cancel scancel {' '.join(arrays)}",
    ]


def write_scripts(sweep: Sweep, texts: Sequence[str]) -> list[Path]:
    """Keep the scripts with the sweep."""
    folder = sweep.folder / SCRIPTS
    folder.mkdir(exist_ok=True)
    first = len(list(folder.glob("*.sh")))
    paths = [folder / f"{first + index}.sh" for index in range(len(texts))]
    for path, text in zip(paths, texts, strict=True):
        path.write_text(text)
    return paths
