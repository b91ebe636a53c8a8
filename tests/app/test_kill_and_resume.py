"""A run that is killed again and again ends, to the last bit, where one ends that nobody touched."""

from __future__ import annotations

import itertools
import json
import random
import signal

import pytest
from calls import composed
from killing import DIT, UNET, end_of, seen, start, unlike, wait

from denoiselab.training.checkpoint import FOLDER, checkpoints_of, step_of

STEPS = 60
SMALL = [
    "resume=auto",
    "datamodule.batch_size=8",
    "datamodule.train_size=130",  # of 480 that are drawn, so that starts, steps and saves lie in several epochs
    "datamodule.eval_batch_size=150",
    "datamodule.flip=true",
    "schedule.warmup_steps=20",
    "sampler.nfe=2",
    "logger=none",
    f"trainer.max_steps={STEPS}",
    "trainer.val_every=10",
    "callbacks.monitor.every=4",
    "callbacks.validation.log_snrs=[-2,2]",
    "callbacks.checkpoints.every=5",
    "callbacks.pictures.every=10",
    "callbacks.pictures.rows=1",
    "+callbacks.recorder._target_=killing.Recorder",
]
PLAIN = ["metrics=none"]
MEASURED = [
    "metrics.counts=[20]",
    "metrics.every=20",
    "metrics.weights=[ema,raw]",
    *(f"metrics.measures.{name}=null" for name in ("kernel", "precision_recall", "density_coverage")),
]
WORKERS = ["metrics=none", "datamodule.num_workers=2"]

# Before what a kill comes, and how many such things it lets pass at most (of "time": milliseconds).
OFTEN = {"": 12, "checkpoints/": 9, "time": 60, "trace.csv": 1, "metrics.csv": 1}
EVERY_TEN_STEPS = {"samples/": 2, "checkpoints/.best": 4, "validation": 2}
AT_THE_END = {"checkpoints/.best": 0, "samples/": 1, "metrics.jsonl": 2}  # when the last step is saved; if they happen


def config(folder, name, overrides):
    """A run of that name, which notes what it sees."""
    return composed(*SMALL, *overrides, f"run={folder / name}", f"+callbacks.recorder.file={folder / name}.seen")


def plan(kills):
    """(step, thing, how many of them are let pass) of each kill: one at the start, the others spread over the run."""
    chance, often, rarely = (
        random.Random(kills),
        itertools.cycle(OFTEN.items()),
        itertools.cycle(EVERY_TEN_STEPS.items()),
    )
    yield 0, "", chance.randint(0, 9)
    for i in range(kills - 1):
        steps = range(STEPS * i // (kills - 1) + 1, STEPS * (i + 1) // (kills - 1) + 1)
        tens = [step for step in steps if step % 10 == 0]
        thing, most = next(rarely if tens and (len(steps) < 10 or i == 1) else often)
        yield chance.choice(tens if thing in EVERY_TEN_STEPS else steps), thing, chance.randint(0, most)


def straight_run(folder, *overrides):
    assert wait(start(config(folder, "straight", overrides))) == [0], (folder / "straight.out").read_text()
    return folder / "straight"


def killed_run(folder, kills, *overrides):
    """A run that is killed so many times on its way, some more times at its end, and then left alone."""
    job, run = config(folder, "killed", overrides), folder / "killed"
    ends, last_steps = [], set()

    def launch(**trap):
        (end,) = wait(start(job, **trap))
        ends.append(end)
        assert end in (0, -signal.SIGKILL), (folder / "killed.out").read_text()

    for step, thing, count in plan(kills):
        saved = max((step_of(path) for path in checkpoints_of(run / FOLDER)), default=0)
        launch(step=0 if saved >= step else step, thing="" if saved >= step else thing, count=count)
        notes = (folder / "killed.seen").read_text().splitlines() if (folder / "killed.seen").exists() else []
        last_steps.add(json.loads(notes[-1])["step"] if notes else None)
    assert ends == [-signal.SIGKILL] * kills
    assert len(last_steps) >= 0.6 * kills
    for thing, count in AT_THE_END.items():
        launch(step=0, thing=thing, count=count)
    launch()
    assert ends[-1] == 0
    return run


def check_equal(straight, killed):
    """Weights, averages, optimizer, schedule and all else that a run leaves; and all that each step of each start saw."""
    assert unlike(end_of(straight), end_of(killed)) == []
    once, often = seen(straight.with_suffix(".seen")), seen(killed.with_suffix(".seen"))
    assert {step for step, _ in once} == set(range(STEPS))
    assert {index for lines in once.values() for line in lines for index in json.loads(line)["index"]} == set(
        range(130)
    )
    assert often.keys() == once.keys()
    for where, lines in often.items():  # indices, places, t, losses, noise, labels and masks
        assert lines.keys() == once[where].keys(), where
    assert max(sum(lines.values()) for lines in often.values()) > 1  # steps were made again


def test_a_killed_run_ends_where_an_untouched_one_does(tmp_path):
    overrides = [*UNET, *PLAIN, "trainer.accumulate=2"]
    check_equal(straight_run(tmp_path, *overrides), killed_run(tmp_path, 4, *overrides))


@pytest.mark.slow
@pytest.mark.parametrize("precision", ["32-true", "bf16-mixed"])
@pytest.mark.parametrize(
    ("network", "accumulate", "rest"),
    [(UNET, 1, MEASURED), (UNET, 2, WORKERS), (DIT, 1, WORKERS), (DIT, 2, PLAIN)],
    ids=["unet-1", "unet-2", "dit-1", "dit-2"],
)
def test_twenty_kills_change_no_bit(tmp_path, network, accumulate, rest, precision):
    overrides = [*network, *rest, f"trainer.accumulate={accumulate}", f"trainer.precision={precision}"]
    check_equal(straight_run(tmp_path, *overrides), killed_run(tmp_path, 20, *overrides))
    hit = {thing.partition("/")[0] for thing in (tmp_path / "killed.kills").read_text().split()}
    assert hit >= {"checkpoints", "validation", "samples", "trace.csv", "metrics.csv"}
    assert ("metrics.jsonl" in hit) == (rest is MEASURED)
