"""What a run draws does not depend on how its batch is shared out, and its weights only by rounding.

One rank averages eight gradients in one sum, two ranks average two sums of four: in float32 the gradients differ by about
2⁻²⁴ of their size, and AdamW, which divides by √v, makes more of that where gradients are next to nothing. In float64 the
same differences are 2²⁹ times smaller, which nothing but rounding does.
"""

from __future__ import annotations

import csv

import pytest
from calls import composed
from killing import DIT, UNET, by_place, end_of, seen, start, unlike, wait

from denoiselab.training.checkpoint import FOLDER, checkpoints_of, load_checkpoint, newest_checkpoint

STEPS = 50
SMALL = [
    "resume=auto",
    "datamodule.batch_size=8",
    "datamodule.train_size=90",  # of 400 that are drawn: batches lie across the ends of epochs
    "datamodule.flip=true",
    "schedule.warmup_steps=10",
    "logger=none",
    "metrics=none",
    f"trainer.max_steps={STEPS}",
    "trainer.val_every=25",
    "callbacks.monitor.every=10",
    "callbacks.validation.log_snrs=[-2,2]",
    "callbacks.checkpoints.every=20",
    "callbacks.pictures=null",
    "+callbacks.recorder._target_=killing.Recorder",
]
SGD = ["optimizer._target_=torch.optim.SGD", "optimizer.lr=0.02", "+optimizer.momentum=0.9"]
SGD += [f"~optimizer.{key}" for key in ("betas", "eps", "fused")]
DOUBLE = ["+callbacks.double._target_=killing.Double"]
SHAPES = {"1 x 8": (1, 1), "2 x 4": (2, 1), "1 x 4 x 2": (1, 2), "2 x 2 x 2": (2, 2)}  # ranks, accumulation


def config(folder, name, ranks, accumulate, overrides):
    shape = ["trainer=ddp", "trainer.accelerator=cpu", f"trainer.devices={ranks}"] if ranks > 1 else []
    files = [f"run={folder / name}", f"+callbacks.recorder.file={folder / name}.seen"]
    return composed(*shape, *SMALL, *overrides, f"trainer.accumulate={accumulate}", *files)


def train(folder, name, ranks, accumulate, *overrides):
    done = wait(start(config(folder, name, ranks, accumulate, overrides), ranks=ranks))
    assert done == [0] * ranks, (folder / f"{name}.out").read_text()
    return folder / name


def trace(run):
    with (run / "trace.csv").open() as file:
        return list(csv.DictReader(file))


def gaps(run, other):
    """The relative differences of two runs' weights (of all, in the Euclidean norm) and of their losses (the largest)."""
    a, b = (load_checkpoint(newest_checkpoint(folder))["state_dict"] for folder in (run, other))
    assert a.keys() == b.keys()
    difference = sum(float((a[key].double() - b[key].double()).square().sum()) for key in b)
    weights = (difference / sum(float(value.double().square().sum()) for value in b.values())) ** 0.5
    pairs = zip(trace(run), trace(other), strict=True)
    return weights, max(abs(float(x["loss"]) / float(y["loss"]) - 1) for x, y in pairs)


def check_shapes(folder, weights, losses, *overrides):
    """All shapes draw the same, and end within so much of one another."""
    one, *others = (train(folder, name, *shape, *overrides) for name, shape in SHAPES.items())
    drawn = by_place(one.with_suffix(".seen"))
    assert len(drawn) == STEPS * 8
    assert {seen["index"] for seen in drawn.values()} == set(range(90))
    for other in others:
        found = by_place(other.with_suffix(".seen"))
        assert found.keys() == drawn.keys()
        for key in ("index", "t", "label", "noise", "masks"):
            assert [found[at][key] for at in drawn] == [drawn[at][key] for at in drawn], (other.name, key)
        assert [row["samples"] for row in trace(other)] == [row["samples"] for row in trace(one)]
        found_weights, found_losses = gaps(other, one)
        assert found_weights < weights, other.name
        assert found_losses < losses, other.name
    assert -1 in {seen["label"] for seen in drawn.values()}  # some labels were dropped
    return drawn


def test_shapes_draw_the_same_and_differ_by_rounding(tmp_path):
    drawn = check_shapes(tmp_path, 3e-6, 1e-6, *UNET)  # seen: 3e-7 and 5e-8
    assert len({seen["masks"] for seen in drawn.values()}) == len(drawn)


@pytest.mark.slow
@pytest.mark.parametrize(
    ("overrides", "weights", "losses"),
    [
        ([*UNET, *DOUBLE], 1e-14, 1e-14),  # seen: 6e-16 and 2e-16
        ([*UNET, *SGD], 2e-7, 1e-6),  # seen: 2e-8 and 7e-8
        (DIT, 1e-5, 1e-6),  # seen: 1e-6 and 6e-8
        ([*DIT, *DOUBLE], 5e-14, 1e-14),  # seen: 4e-15 and 3e-16
    ],
    ids=["unet-float64", "unet-sgd", "dit", "dit-float64"],
)
def test_the_difference_is_rounding(tmp_path, overrides, weights, losses):
    check_shapes(tmp_path, weights, losses, *overrides)


@pytest.mark.slow
def test_two_ranks_that_are_killed_end_where_untouched_ones_do(tmp_path):
    overrides = [*UNET, "datamodule.num_workers=1"]
    straight = train(tmp_path, "straight", 2, 1, *overrides)
    ends = wait(start(config(tmp_path, "killed", 2, 1, overrides), ranks=2, step=38, thing="", count=0))
    assert ends[0] == -9
    killed = train(tmp_path, "killed", 2, 1, *overrides)
    assert unlike(end_of(straight), end_of(killed)) == []
    once, often = seen(tmp_path / "straight.seen"), seen(tmp_path / "killed.seen")
    assert once.keys() == often.keys() == {(step, place) for step in range(STEPS) for place in (0, 4)}
    assert all(lines.keys() == once[where].keys() for where, lines in often.items())
    assert max(sum(lines.values()) for lines in often.values()) > 1  # steps were made again


@pytest.mark.parametrize("shape", ["1 x 8", "2 x 2 x 2"])
def test_a_run_of_two_ranks_goes_on_with_another_shape(tmp_path, shape):
    straight = train(tmp_path, "straight", 1, 1, *UNET)
    ends = wait(start(config(tmp_path, "moved", 2, 1, UNET), ranks=2, step=30, thing="", count=0))
    assert ends[0] == -9
    assert [path.name for path in checkpoints_of(tmp_path / "moved" / FOLDER)] == ["step_0000020.ckpt"]
    before = len((tmp_path / "moved.seen").read_text())
    moved = train(tmp_path, "moved", *SHAPES[shape], *UNET)

    with (tmp_path / "moved.seen").open() as file:
        file.seek(before)
        (tmp_path / "after.seen").write_text(file.read())
    drawn, after = by_place(tmp_path / "straight.seen"), by_place(tmp_path / "after.seen")
    assert after.keys() == {(step, place) for step in range(20, STEPS) for place in range(8)}
    for at, found in after.items():
        assert {**found, "loss": 0} == {**drawn[at], "loss": 0}
    assert [row["samples"] for row in trace(moved)] == [row["samples"] for row in trace(straight)]
    weights, losses = gaps(moved, straight)
    assert weights < 3e-6
    assert losses < 1e-6
