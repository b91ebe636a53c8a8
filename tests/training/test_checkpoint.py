from __future__ import annotations

import io
import os
import pickle
import re
import zipfile
from pathlib import Path

import pytest
import torch
from crashes import content_of
from lightning.pytorch.callbacks import Callback
from tiny import equal, fit, tiny_module, weights_of

from denoiselab.training import saving
from denoiselab.training.checkpoint import (
    FOLDER,
    SCHEMA,
    checkpoints_of,
    environment,
    load_checkpoint,
    network_weights,
    newest_checkpoint,
    newest_valid,
    step_name,
    step_of,
    verify,
    written_step,
)
from denoiselab.training.checkpoint_io import write_checkpoint
from denoiselab.training.ema import EMA
from denoiselab.training.pickles import flaw_of_pickle
from denoiselab.training.saving import Checkpoints


def test_steps_are_compared_as_numbers(tmp_path):
    folder = tmp_path / "checkpoints"
    folder.mkdir()
    for name in ("step_9999999.ckpt", "step_10000000.ckpt", "step_0000001.ckpt", "step_x.ckpt", "best.ckpt"):
        write_checkpoint(content_of(10_000_000), folder / name)
    assert newest_checkpoint(tmp_path).name == "step_10000000.ckpt"
    assert [step_of(path) for path in checkpoints_of(folder)] == [1, 9999999, 10000000]
    assert step_name(9999999) == "step_9999999.ckpt"
    assert step_of(folder / "best.ckpt") is None


def test_a_run_without_checkpoints(tmp_path):
    with pytest.raises(ValueError, match=re.escape(f"run={tmp_path}: has no checkpoint in checkpoints/")):
        newest_checkpoint(tmp_path)


def test_a_checkpoint_holds_raw_and_averaged_weights_as_plain_data(tmp_path):
    config = {"seed": 3, "sampler": {"_target_": "x.Y", "nfe": 20, "list": [1, 2.5, None, True]}}
    module = tiny_module(config=config, ema=EMA(decays={"ema": 0.9, "slow": 0.99}))
    fit(module, tmp_path, callbacks=[Checkpoints(every=100)])
    path = newest_checkpoint(tmp_path)
    plain = torch.load(path, weights_only=True)
    assert plain["schema"] == SCHEMA
    assert plain["config"] == config
    assert plain["ema_updates"] == 4
    assert plain["environment"] == environment()
    assert set(environment()) == {"python", "torch", "lightning", "denoiselab"}
    assert {type(version) for version in environment().values()} == {str}
    assert set(plain["ema"]) == {"ema", "slow"}
    checkpoint = load_checkpoint(path)
    raw = weights_of(module)
    assert equal(network_weights(checkpoint, "raw"), raw)
    for name in ("ema", "slow"):
        assert equal(network_weights(checkpoint, name), module.ema.averages[name])
        assert not equal(network_weights(checkpoint, name), raw)
    with pytest.raises(ValueError, match="weights=fast: the checkpoint has ema, slow, raw"):
        network_weights(checkpoint, "fast")


def test_training_goes_on_from_a_checkpoint_as_if_never_stopped(tmp_path):
    whole = tiny_module(dropout=0.3)
    fit(whole, tmp_path / "whole", steps=5)
    fit(tiny_module(dropout=0.3), tmp_path / "part", steps=3, callbacks=[Checkpoints(every=100)])
    torch.manual_seed(99)  # no generator's state is needed
    resumed = tiny_module(dropout=0.3)
    trainer = fit(resumed, tmp_path / "rest", steps=5, resume=newest_checkpoint(tmp_path / "part"))
    assert trainer.global_step == resumed.ema.updates == 5
    assert equal(weights_of(resumed), weights_of(whole))
    assert equal(resumed.ema.averages["ema"], whole.ema.averages["ema"])


def test_saving_while_an_average_is_applied_stores_raw_as_raw(tmp_path):
    seen = {}

    class SaveInValidation(Callback):
        def on_validation_end(self, trainer, module):
            seen["raw"] = weights_of(module)
            with module.denoiser("ema"):
                seen["applied"] = weights_of(module)
                trainer.save_checkpoint(tmp_path / "inside.ckpt")

    module = tiny_module()
    fit(module, tmp_path, steps=2, val_every=2, callbacks=[SaveInValidation()])
    checkpoint = load_checkpoint(tmp_path / "inside.ckpt")
    assert not equal(seen["raw"], seen["applied"])
    assert equal(network_weights(checkpoint, "raw"), seen["raw"])
    assert equal(network_weights(checkpoint, "ema"), seen["applied"])
    assert equal(weights_of(module), seen["raw"])


def good_checkpoint(path):
    write_checkpoint(content_of(1, size=1000), path)
    return path


def refusal(path):
    """The one line that a file is refused with."""
    with pytest.raises(ValueError, match=re.escape(f"checkpoint={path}: ")) as caught:
        load_checkpoint(path)
    assert "\n" not in str(caught.value)
    return str(caught.value)


def test_a_missing_file(tmp_path):
    assert refusal(tmp_path / "no.ckpt").endswith("no such file")
    assert refusal(tmp_path).endswith("no such file")


@pytest.mark.parametrize("share", [0, 0.3, 0.9])
def test_a_truncated_file(tmp_path, share):
    path = good_checkpoint(tmp_path / "a.ckpt")
    whole = path.read_bytes()
    path.write_bytes(whole[: int(len(whole) * share)])
    assert "cannot be read as plain data" in refusal(path)


def test_a_flipped_bit(tmp_path):
    path = good_checkpoint(tmp_path / "a.ckpt")
    content = bytearray(path.read_bytes())
    content[len(content) // 2] ^= 1  # in the middle of a tensor
    path.write_bytes(content)
    refusal(path)


class Hostile:
    def __init__(self, victim):
        self.victim = victim

    def __reduce__(self):
        return Path.touch, (self.victim,)


@pytest.mark.parametrize("zipped", [True, False])
def test_code_in_a_file_is_not_run(tmp_path, zipped):
    path, victim = tmp_path / "evil.ckpt", tmp_path / "victim"
    content = {"schema": SCHEMA, "state_dict": {}, "config": Hostile(victim)}
    if zipped:
        torch.save(content, path)
    else:
        path.write_bytes(pickle.dumps(content))
    assert "cannot be read as plain data" in refusal(path)
    assert not victim.exists()
    if zipped:
        torch.load(path, weights_only=False)
        assert victim.exists()  # the file was hostile indeed


@pytest.mark.parametrize(
    ("content", "found"),
    [({"schema": 99, "state_dict": {}}, "99"), ({"state_dict": {}}, "None"), ([1, 2], "None")],
)
def test_another_layout(tmp_path, content, found):
    path = tmp_path / "a.ckpt"
    torch.save(content, path)
    assert refusal(path).endswith(f"layout {found} is not the layout {SCHEMA} that this version reads")


def test_a_file_of_an_older_version_names_no_environment(tmp_path):
    assert "environment" not in content_of(1)
    assert load_checkpoint(good_checkpoint(tmp_path / "a.ckpt"))["global_step"] == 1


def test_configs_of_older_checkpoints_name_the_callback_here():
    from denoiselab.training import checkpoint

    assert checkpoint.Checkpoints is saving.Checkpoints
    with pytest.raises(AttributeError, match="has no attribute 'Others'"):
        checkpoint.Others  # noqa: B018


@pytest.mark.parametrize(
    ("key", "value"),
    [
        ("config", None),
        ("config", [1]),
        ("ema", None),
        ("ema_updates", 1.0),
        ("ema_updates", True),
        ("state_dict", "weights"),
        ("global_step", None),
    ],
)
def test_a_key_that_is_missing_or_of_another_type(tmp_path, key, value):
    path, content = tmp_path / "a.ckpt", content_of(1)
    for changed in ({k: v for k, v in content.items() if k != key}, content | {key: value}):
        torch.save(changed, path)
        assert refusal(path).endswith(f": has no {key}; it is damaged, or not of this program")


@pytest.mark.parametrize(
    ("key", "value", "named"),
    [
        ("state_dict", {"network.w": 1.0}, "state_dict"),
        ("state_dict", {1: torch.zeros(1)}, "state_dict"),
        ("ema", {"slow": {"w": "1"}}, "slow"),
        ("ema", {"slow": torch.zeros(1)}, "slow"),
        ("ema", {3: {}}, "3"),
    ],
)
def test_weights_that_are_no_tensors(tmp_path, key, value, named):
    path = tmp_path / "a.ckpt"
    torch.save(content_of(1) | {key: value}, path)
    assert f": {named} is no dict of names and tensors" in refusal(path)


@pytest.mark.parametrize("key", ["global_step", "ema_updates"])
@pytest.mark.parametrize(("value", "said"), [(-1, "-1"), (2**63, "of type int"), (10**600, "of type int")])
def test_counts_that_are_none(tmp_path, key, value, said):
    path = tmp_path / "a.ckpt"
    torch.save(content_of(1) | {key: value}, path)
    assert f": {key} is {said};" in refusal(path)


@pytest.mark.parametrize("levels", [5, 30])
def test_a_layout_that_would_be_a_long_text(tmp_path, levels):
    path, unfolding = tmp_path / "a.ckpt", ["x"] * 10
    for _ in range(levels):
        unfolding = [unfolding] * 10
    torch.save(content_of(1) | {"schema": unfolding}, path)
    assert len(refusal(path)) < 400


def test_plain_data_of_all_kinds_is_read(tmp_path):
    kinds = (
        torch.float64,
        torch.float16,
        torch.bfloat16,
        torch.complex64,
        torch.int64,
        torch.int16,
        torch.uint8,
        torch.bool,
    )
    tensors = [torch.zeros(3, dtype=kind) for kind in kinds]
    content = {
        "tensors": [
            *tensors,
            torch.zeros(0),
            torch.zeros(()),
            torch.zeros(9, 9)[3:5, ::2],
            torch.nn.Parameter(torch.zeros(2)),
        ],
        "others": [
            torch.Size([1, 2]),
            torch.float32,
            torch.device("cpu"),
            {1, "b"},
            b"x",
            2**70,
            -1,
            0.5,
            None,
            True,
            "é" * 300,
        ],
        "shared": [tensors] * 3,
    }
    content["circle"] = content
    torch.save(content, tmp_path / "a.ckpt")
    assert verify(tmp_path / "a.ckpt") is None


def test_a_network_of_many_tensors_is_no_bomb(tmp_path):
    weights = {f"layer.{i}": torch.zeros(1) for i in range(3000)}
    optimizer = {"state": {i: {"step": w, "exp_avg": w, "exp_avg_sq": w} for i, w in enumerate(weights.values())}}
    torch.save(
        {"state_dict": weights, "ema": {"a": weights, "b": weights}, "optimizer": [optimizer]}, tmp_path / "a.ckpt"
    )
    assert verify(tmp_path / "a.ckpt") is None


def nested(levels, made):
    """Ten times what is ten times what is..., as a pickle; `made` of the last."""
    pickled = b"\x80\x02(" + b"(" + b"K\x01" * 10 + b"tr\0\0\0\0"
    for i in range(levels):
        pickled += b"(" + (b"j" + i.to_bytes(4, "little")) * 10 + b"tr" + (i + 1).to_bytes(4, "little")
    return pickled + made(b"j" + levels.to_bytes(4, "little")) + b"."


LATE = b"]r\xff\0\0\0\x85r\xfe\0\0\0j\xff\0\0\0(" + b"K\x01" * 2000 + b"e"  # filled after a tuple was made of it


@pytest.mark.parametrize(
    ("pickled", "flaw"),
    [
        (nested(30, lambda last: b"}" + last + b"K\x01s"), "something in it is made of more than 1000 parts"),
        (nested(2, lambda last: b"}(" + last + b"K\x01u"), "something in it is made of more than 1000 parts"),
        (nested(1, lambda last: b"}(" + last + b"K\x01u"), None),
        (b"\x80\x02" + LATE + b"cbuiltins\nset\nj\xfe\0\0\0R.", "something in it is made of more than 1000 parts"),
        (b"\x80\x02]]r\0\0\0\0(" + b"h\0" * 9 + b"ee.", LookupError),
        (b"\x80\x02(" + b"K\x01s.", LookupError),
        (b"\x80\x02e.", LookupError),
        (b"\x80\x02(e.", LookupError),
        (b"\x80\x02((K\x01e.", "it fills nothing"),
        (b"\x80\x02K\x01Q.", "it names a storage in another way than torch"),
        (b"\x80\x02(K\x01K\x01K\x01K\x01K\x01tQ.", "it names a storage in another way than torch"),
        (b"\x80\x02K\x01K\x020.", "it uses POP"),
    ],
)
def test_pickles(pickled, flaw):
    if flaw is LookupError:
        with pytest.raises(LookupError):
            flaw_of_pickle(pickled, {})
    else:
        assert flaw_of_pickle(pickled, {}) == flaw


def test_lists_that_unfold_without_end():
    pickled = b"\x80\x02](" + b"K\x01" * 10 + b"er\0\0\0\0"
    for i in range(30):
        pickled += b"](" + (b"j" + i.to_bytes(4, "little")) * 10 + b"er" + (i + 1).to_bytes(4, "little")
    assert flaw_of_pickle(pickled + b".", {}) == "it unfolds to more than 10,000,000 parts"


def rezipped(path, change):
    """A checkpoint whose archive is written anew, entry by entry, by `change(archive, entry, content)`."""
    good_checkpoint(path)
    written = io.BytesIO()
    with zipfile.ZipFile(path) as old, zipfile.ZipFile(written, "w") as new:
        for entry in old.infolist():
            change(new, zipfile.ZipInfo(entry.filename), old.read(entry))
    path.write_bytes(written.getvalue())
    return path


def unchanged(archive, entry, content):
    entry.external_attr = 0
    archive.writestr(entry, content)
    archive.getinfo(entry.filename).external_attr = 0


def compressed(archive, entry, content):
    archive.writestr(entry.filename, content, zipfile.ZIP_DEFLATED)


def bomb(archive, entry, content):
    archive.writestr(entry.filename, content + bytes(10**6), zipfile.ZIP_DEFLATED)


def renamed(name):
    def change(archive, entry, content):
        unchanged(archive, entry, content)
        if entry.filename.endswith("/version"):
            unchanged(archive, zipfile.ZipInfo(name), b"1")

    return change


def other_case(archive, entry, content):
    unchanged(archive, entry, content)
    if entry.filename.endswith("/data.pkl"):
        unchanged(archive, zipfile.ZipInfo(entry.filename.upper()), content)


def hidden_code(archive, entry, content):
    pickled = entry.filename.endswith("/data.pkl")
    evil = b"\x80\x02cos\nsystem\n(X\x04\0\0\0truetR."
    name = entry.filename.replace("/data.pkl", "/data.PKL")
    unchanged(archive, zipfile.ZipInfo(name), evil if pickled else content)


def shorter(archive, entry, content):
    unchanged(archive, entry, content[:-4] if "/data/" in entry.filename else content)


def longer(archive, entry, content):
    unchanged(archive, entry, content + b"\0" * 4 if "/data/" in entry.filename else content)


def folder(archive, entry, content):
    unchanged(archive, entry, content)
    archive.getinfo(entry.filename).external_attr = 16 if entry.filename.endswith("data/0") else 0


def overlapping(archive, entry, content):
    """Two entries that share their bytes, so that together they are larger than the file."""
    unchanged(archive, entry, content)
    if entry.filename.endswith("data/0"):
        twin = zipfile.ZipInfo("archive/twin")
        twin.file_size = twin.compress_size = 10**6
        twin.CRC, twin.header_offset = 0, 0
        archive.filelist.append(twin)
        archive.NameToInfo[twin.filename] = twin


@pytest.mark.parametrize(
    ("change", "reason"),
    [
        (compressed, "is compressed"),
        (bomb, "is compressed"),
        (renamed("/etc/cron.d/evil"), "'/etc/cron.d/evil' is an unsafe name"),
        (renamed("archive/../../evil"), "'archive/../../evil' is an unsafe name"),
        (renamed("archive\\..\\evil"), "is an unsafe name"),
        (folder, "'archive/data/0' is no file"),
        (renamed("archive/data.pkl"), "two entries of one name"),
        (overlapping, "its entries are larger than the file"),
        (other_case, "two entries of one name"),
        (hidden_code, "it names 'os.system'"),
        (shorter, "a tensor's numbers are 3996 bytes in it, not 4000"),
        (longer, "a tensor's numbers are 4004 bytes in it, not 4000"),
    ],
)
@pytest.mark.filterwarnings("ignore:Duplicate name")
def test_archives_that_torch_did_not_write(tmp_path, change, reason):
    assert verify(rezipped(tmp_path / "a.ckpt", unchanged)) is None
    path = rezipped(tmp_path / "a.ckpt", change)
    assert reason in refusal(path)
    assert refusal(path) == f"checkpoint={path}: {verify(path)}"
    assert sorted(tmp_path.iterdir()) == [path]


def test_a_name_that_others_read_in_another_way(tmp_path):
    path = rezipped(tmp_path / "a.ckpt", renamed("archive/seen!hidden"))
    path.write_bytes(path.read_bytes().replace(b"seen!hidden", b"seen\0hidden"))  # zipfile reads as far as the zero
    assert "'archive/seen' is an unsafe name" in refusal(path)


def test_a_changed_tensor_is_found_by_its_checksum(tmp_path):
    path = good_checkpoint(tmp_path / "a.ckpt")
    content = bytearray(path.read_bytes())
    with zipfile.ZipFile(path) as archive:
        start = archive.getinfo("archive/data/0").header_offset
    content[start + 1000] ^= 1
    path.write_bytes(content)
    torch.load(path, weights_only=True)  # does not see it
    assert "the checksum of 'archive/data/0' differs" in refusal(path)


def test_what_is_no_file_is_refused_without_waiting(tmp_path):
    os.mkfifo(tmp_path / "pipe")
    for path in (tmp_path / "pipe", tmp_path, tmp_path / "none"):
        assert verify(path) is not None
        assert written_step(path) is None


def test_the_newest_good_one(tmp_path):
    assert newest_valid(tmp_path) == (None, [])
    assert newest_valid(tmp_path / "none") == (None, [])
    for step in (1, 2, 3):
        write_checkpoint(content_of(step), tmp_path / step_name(step))
    assert newest_valid(tmp_path) == (tmp_path / step_name(3), [])
    (tmp_path / step_name(3)).write_bytes(b"")
    newest, damaged = newest_valid(tmp_path)
    assert newest == tmp_path / step_name(2)
    assert written_step(newest) == 2
    assert damaged == [f"checkpoint={tmp_path / step_name(3)}: {verify(tmp_path / step_name(3))}"]
    assert (tmp_path / step_name(3)).exists()


@pytest.mark.parametrize(
    ("change", "reason"),
    [
        (lambda whole: {"x": 1}, "layout None is not the layout"),
        (lambda whole: whole | {"schema": 99}, "layout 99 is not the layout"),
        (lambda whole: {key: value for key, value in whole.items() if key != "ema"}, "has no ema;"),
        (lambda whole: whole | {"global_step": 4}, "is of step 4"),
        (
            lambda whole: whole | {"state_dict": {"network.w": torch.tensor([1.0, torch.nan])}},
            "network.w is not finite",
        ),
        (lambda whole: whole | {"ema": {"ema": {"w": torch.tensor([torch.inf])}}}, "ema.w is not finite"),
    ],
)
def test_a_whole_file_that_no_run_can_go_on_from_is_skipped(tmp_path, caplog, change, reason):
    folder = tmp_path / FOLDER
    write_checkpoint(content_of(2), folder / step_name(2))
    write_checkpoint(change(content_of(3)), folder / step_name(3))
    assert verify(folder / step_name(3)) is None
    assert newest_checkpoint(tmp_path) == folder / step_name(2)
    (line,) = caplog.messages
    assert line.startswith(f"checkpoint={folder / step_name(3)}: ")
    assert reason in line


def test_a_mask_may_be_infinite(tmp_path):
    masked = {"state_dict": {"network.mask": torch.tensor([-torch.inf, 0.0])}}
    write_checkpoint(content_of(1) | masked, tmp_path / step_name(1))
    assert newest_valid(tmp_path) == (tmp_path / step_name(1), [])


def test_compiling_changes_no_key(tmp_path):
    plain, compiled = tiny_module(), tiny_module()
    compiled.network.compile(backend="eager")
    for name, module in (("plain", plain), ("compiled", compiled)):
        fit(module, tmp_path / name, steps=2, callbacks=[Checkpoints(every=100)])
    one, other = (load_checkpoint(newest_checkpoint(tmp_path / name)) for name in ("plain", "compiled"))
    assert compiled.network._compiled_call_impl is not None
    assert one.keys() == other.keys()
    assert one["ema"]["ema"].keys() == other["ema"]["ema"].keys()
    assert equal(one["state_dict"], other["state_dict"])
    fit(tiny_module(), tmp_path / "rest", steps=3, resume=newest_checkpoint(tmp_path / "compiled"))
