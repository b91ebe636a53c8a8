from __future__ import annotations

import logging
import multiprocessing
import os
import signal
import subprocess
import time
from itertools import islice
from pathlib import Path
from types import SimpleNamespace

import lightning
import pytest
import torch
from torch.utils.data import DataLoader

from denoiselab.data.datamodule import ImageDataModule, ignore_signals, naming_workers
from denoiselab.data.dataset import InMemoryImages

needs_proc = pytest.mark.skipif(not Path("/proc/self/stat").exists(), reason="looks at processes as Linux shows them")
VALUES = {"channels": 1, "resolution": [2, 3], "num_classes": 4, "batch_size": 6, "seed": 2}


class Toy(ImageDataModule):
    """Twenty training and eleven test images whose pixels say which one they are."""

    loads = 0

    def load(self, split):
        self.loads += 1
        size = 20 if split == "train" else 11
        images = torch.arange(size, dtype=torch.uint8)[:, None, None, None] + torch.arange(3).mul(50).byte()
        return self._in_memory(split, images.expand(size, 1, 2, 3).clone(), torch.arange(size) % 4)


def toy(**changes):
    return Toy(**(VALUES | changes))


def rank_of(module, rank, world_size, *, accumulate=1, step=0):
    module.trainer = SimpleNamespace(
        global_rank=rank,
        world_size=world_size,
        accumulate_grad_batches=accumulate,
        global_step=step,
        limit_train_batches=1.0,
        max_epochs=-1,
        strategy=SimpleNamespace(root_device=torch.device("cpu")),
    )
    return module


def same(one, other):
    return one.keys() == other.keys() and all(torch.equal(one[key], other[key]) for key in one)


@pytest.mark.parametrize(
    ("changes", "line"),
    [
        ({"channels": 2}, r"channels=2: must be 1 \(grey\) or 3 \(RGB\)"),
        ({"resolution": 0}, r"resolution=0: must be one positive integer or \[height, width\]"),
        ({"resolution": [8]}, r"resolution=\[8\]: must be one positive integer or \[height, width\]"),
        ({"num_classes": -1}, "num_classes=-1: must be at least 0"),
        ({"batch_size": 0}, "batch_size=0: must be at least 1"),
        ({"seed": -1}, "seed=-1: must be at least 0"),
        ({"num_workers": -1}, "num_workers=-1: must be at least 0"),
        ({"eval_batch_size": 0}, "eval_batch_size=0: must be at least 1"),
    ],
)
def test_values_out_of_range(changes, line):
    with pytest.raises(ValueError, match=f"^{line}$"):
        toy(**changes)


def test_attributes_keep_the_names_of_the_arguments():
    module = toy(num_workers=1, flip=True, eval_batch_size=7)
    for key, value in (VALUES | {"num_workers": 1, "flip": True, "eval_batch_size": 7}).items():
        assert getattr(module, key) == value
    assert module.size == (2, 3)


def test_a_batch_that_does_not_divide():
    line = "^batch_size=6: must be divisible by 2 ranks x 2 accumulated micro-batches$"
    with pytest.raises(ValueError, match=line):
        toy().check_batch(2, 2)
    with pytest.raises(ValueError, match=line):
        rank_of(toy(), 0, 2, accumulate=2).train_dataloader()
    toy().check_batch(3, 2)


def test_sets_are_read_once():
    module = toy()
    module.check()
    assert module.train_set() is module.train_set()
    assert module.test_set() is not module.train_set()
    module.fingerprint("train")
    assert module.loads == 2


def test_the_fingerprint_depends_on_what_the_images_are_alone():
    same_images = toy(batch_size=1, seed=9, flip=True, num_workers=2, eval_batch_size=3)
    assert toy().fingerprint("train") == same_images.fingerprint("train")
    assert len(toy().fingerprint("train")) == 64
    prints = {toy().fingerprint("train"), toy().fingerprint("test"), toy(num_classes=0).fingerprint("train")}
    changed = toy()
    changed.train_set().images[7, 0, 1, 1] += 1
    swapped = toy()
    swapped.train_set().images[[0, 4]] = swapped.train_set().images[[4, 0]]
    assert len(prints | {changed.fingerprint("train"), swapped.fingerprint("train")}) == 5


def test_training_batches_do_not_depend_on_the_shape_of_the_machine():
    whole = list(islice(toy(flip=True).train_dataloader(), 7))
    accumulate = 3
    parts = [
        list(islice(rank_of(toy(flip=True), r, 2, accumulate=accumulate).train_dataloader(), 7 * accumulate))
        for r in range(2)
    ]
    for step, batch in enumerate(whole):
        micro = [parts[r][step * accumulate + k] for k in range(accumulate) for r in range(2)]
        assert same(batch, {key: torch.cat([m[key] for m in micro]) for key in batch})
        assert batch["step"].tolist() == [step] * 6
        assert batch["place"].tolist() == list(range(6))
        assert torch.equal(batch["label"], batch["index"] % 4)
    left_edge = torch.cat([batch["image"][:, 0, 0, 0] >= 100 for batch in whole])
    assert 0 < left_edge.sum() < len(left_edge)  # some are mirrored, some are not


def test_workers_draw_the_same_without_the_global_generator():
    state = torch.get_rng_state()
    alone, workers = toy(flip=True, num_workers=0), toy(flip=True, num_workers=2)
    for one, other in zip(islice(alone.train_dataloader(), 8), islice(workers.train_dataloader(), 8), strict=True):
        assert same(one, other)
    ours, theirs = list(alone.val_dataloader()), list(workers.val_dataloader())
    assert len(ours) == len(theirs) == 1
    assert same(ours[0], theirs[0])
    assert torch.equal(state, torch.get_rng_state())


class SeesSignals(InMemoryImages):
    """A data set whose label says whether the process that reads it ignores Ctrl-C."""

    def label(self, index):
        return int(signal.getsignal(signal.SIGINT) == signal.SIG_IGN)


def test_workers_ignore_ctrl_c():
    before = signal.signal(signal.SIGINT, signal.default_int_handler)  # ignored where a shell has started us behind
    try:
        check_that_workers_ignore_ctrl_c()
    finally:
        signal.signal(signal.SIGINT, before)


def check_that_workers_ignore_ctrl_c():
    module = toy(num_workers=1)
    samples = module.test_set()
    module._sets["test"] = SeesSignals(samples.images, None)
    loader = module.val_dataloader()
    assert loader.worker_init_fn is ignore_signals
    assert next(iter(loader))["label"].tolist() == [1] * 11
    module.num_workers = 0
    assert next(iter(module.val_dataloader()))["label"].tolist() == [0] * 11


class Hangs(InMemoryImages):
    """A data set that never gives what comes after its first ten images."""

    def label(self, index):
        if index >= 10:
            time.sleep(3600)
        return index


def gone(pid):
    """Whether a process has ended; one that nobody has waited for has."""
    try:
        return Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()[0] in "ZX"
    except FileNotFoundError:
        return True


def wait_until(condition, seconds=30):
    end = time.monotonic() + seconds
    while not condition() and time.monotonic() < end:
        time.sleep(0.02)
    assert condition()


def workers_of(iterator):
    return [worker.pid for worker in iterator._workers]


@needs_proc
def test_workers_obey_sigterm_from_the_process_that_trains_alone():
    iterator = iter(toy(num_workers=2).train_dataloader())
    for _ in range(2):  # one of each worker, so that both are under way
        next(iterator)
    pids = workers_of(iterator)
    for name in ("TERM", "INT", "USR1", "USR2"):  # from another process, as a batch system sends them
        subprocess.run(["kill", f"-{name}", *map(str, pids)], check=True)
    for step in range(2, 9):
        assert next(iterator)["step"].tolist() == [step] * 6
    assert not any(map(gone, pids))
    os.kill(pids[0], signal.SIGTERM)
    wait_until(lambda: gone(pids[0]))
    assert not gone(pids[1])
    iterator._shutdown_workers()
    wait_until(lambda: gone(pids[1]))


@needs_proc
@pytest.mark.parametrize("split", ["train", "test"])
def test_a_loader_that_closes_leaves_no_worker_behind(split):
    data = toy(num_workers=2, eval_batch_size=4)
    loader = data.train_dataloader() if split == "train" else data.val_dataloader()
    assert loader.persistent_workers
    iterator = iter(loader)
    next(iterator)
    workers = iterator._workers
    iterator._shutdown_workers()
    assert [worker.exitcode for worker in workers] == [0, 0]  # by themselves, within the loader's patience
    assert all(gone(worker.pid) for worker in workers)


@needs_proc
def test_a_worker_that_hangs_does_not_keep_a_loader_from_closing(monkeypatch):
    data = toy(num_workers=2, eval_batch_size=5)
    data._sets["test"] = Hangs(data.test_set().images, None)
    iterator = iter(data.val_dataloader())
    next(iterator)
    next(iterator)  # what is left hangs
    monkeypatch.setattr("torch.utils.data._utils.MP_STATUS_CHECK_INTERVAL", 0.5)  # patience before terminate()
    iterator._shutdown_workers()
    left = [worker for worker in iterator._workers if not gone(worker.pid)]
    for worker in left:
        worker.kill()  # or Python would wait for it at its end
    assert not left


def load_and_wait(connection):
    torch.utils.data._utils.worker.MP_STATUS_CHECK_INTERVAL = 0.2  # how often a worker looks for its parent
    iterator = iter(toy(num_workers=2).train_dataloader())
    for _ in range(2):
        next(iterator)
    connection.send(workers_of(iterator))
    time.sleep(3600)


@needs_proc
def test_workers_do_not_outlive_a_process_that_is_killed():
    ours, theirs = multiprocessing.Pipe()
    process = multiprocessing.get_context("fork").Process(target=load_and_wait, args=(theirs,))
    process.start()
    pids = ours.recv()
    assert len(pids) == 2
    assert not any(map(gone, pids))
    os.kill(process.pid, signal.SIGKILL)
    process.join()
    wait_until(lambda: all(map(gone, pids)))


def test_ranks_share_the_test_split_without_repeating_a_sample():
    shares = [list(rank_of(toy(eval_batch_size=2), r, 3).val_dataloader()) for r in range(3)]
    indices = [torch.cat([batch["index"] for batch in share]).tolist() for share in shares]
    assert indices == [[0, 3, 6, 9], [1, 4, 7, 10], [2, 5, 8]]
    assert [[len(batch["index"]) for batch in share] for share in shares] == [[2, 2], [2, 2], [2, 1]]
    assert shares[1][1]["image"][:, 0, 0, 0].tolist() == [7, 10]


class Recorder(lightning.LightningModule):
    """Remembers the indices that each step saw."""

    def __init__(self):
        super().__init__()
        self.weight = torch.nn.Parameter(torch.zeros(()))
        self.seen, self.validated = [], []

    def training_step(self, batch, batch_idx):
        assert set(batch["step"].tolist()) == {self.global_step}
        self.seen.append(batch["index"].tolist())
        return self.weight * batch["image"].float().mean()

    def validation_step(self, batch, batch_idx):
        self.validated += batch["index"].tolist()

    def configure_optimizers(self):
        return torch.optim.SGD(self.parameters(), lr=1e-3)


def trainer(folder, max_steps, **changes):
    logging.getLogger("lightning.pytorch").setLevel(logging.ERROR)
    values = {"accumulate_grad_batches": 2, "max_epochs": -1, "val_check_interval": 8} | changes
    return lightning.Trainer(
        default_root_dir=folder,
        max_steps=max_steps,
        accelerator="cpu",
        devices=1,
        logger=False,
        enable_checkpointing=False,
        enable_progress_bar=False,
        enable_model_summary=False,
        use_distributed_sampler=False,
        check_val_every_n_epoch=None,
        num_sanity_val_steps=0,
        **values,
    )


@pytest.mark.filterwarnings("ignore")
def test_lightning_trains_on_one_endless_epoch_and_resumes_where_it_stopped(tmp_path):
    whole, first, second = Recorder(), Recorder(), Recorder()
    trainer(tmp_path, 9).fit(whole, datamodule=toy())
    stopped = trainer(tmp_path, 4)
    stopped.fit(first, datamodule=toy())
    stopped.save_checkpoint(tmp_path / "at4.ckpt")
    trainer(tmp_path, 9).fit(second, datamodule=toy(), ckpt_path=tmp_path / "at4.ckpt")
    assert len(whole.seen) == 18
    assert first.seen + second.seen == whole.seen
    assert torch.equal(whole.weight, second.weight)
    assert whole.validated == list(range(11)) * 2


@pytest.mark.filterwarnings("ignore")
def test_an_epoch_that_ends_would_draw_the_same_again(tmp_path):
    line = "^limit_train_batches=3: training is one endless epoch, set max_steps$"
    with pytest.raises(ValueError, match=line):
        trainer(tmp_path, 9, limit_train_batches=3, val_check_interval=3).fit(Recorder(), datamodule=toy())


def test_a_worker_that_was_killed_is_named_however_it_was_noticed(monkeypatch):
    def broken(*_):
        raise ConnectionResetError(104, "Connection reset by peer")

    monkeypatch.setattr("torch.utils.data.dataloader._MultiProcessingDataLoaderIter._try_get_data", broken)
    words = r"^a DataLoader worker has ended without a word \(killed\?\): ConnectionResetError"
    with pytest.raises(RuntimeError, match=words), naming_workers():
        next(iter(DataLoader([1, 2], num_workers=1)))
    with pytest.raises(ConnectionResetError), naming_workers():
        broken()
