from __future__ import annotations

import io
import os
import re
import zipfile

import pytest
import torch

from denoiselab.runs.weights import load_weights

STATE = {"a": torch.arange(6.0).reshape(2, 3), "b": torch.ones(4, dtype=torch.bfloat16)}
CALL = b"\x80\x02cbuiltins\nbytearray\nJ\x00\x00\x00\x10\x85R."  # bytearray(2**28)


def archive(path, method=zipfile.ZIP_STORED, *, pickled=None, size=None):
    """What torch.save writes, entry by entry."""
    buffer = io.BytesIO()
    torch.save(STATE, buffer)
    with zipfile.ZipFile(buffer) as old, zipfile.ZipFile(path, "w", method) as new:
        for name in old.namelist():
            new.writestr(name, pickled if pickled and name.endswith("data.pkl") else old.read(name))
        new.getinfo("archive/data/0").file_size = size or new.getinfo("archive/data/0").file_size
    return path


@pytest.mark.parametrize("new", [True, False])
def test_what_torch_wrote(new, tmp_path):
    torch.save(STATE, tmp_path / "w.pt", _use_new_zipfile_serialization=new)
    loaded = load_weights(tmp_path / "w.pt")
    assert loaded.keys() == STATE.keys()
    assert all(torch.equal(loaded[name], STATE[name]) for name in STATE)
    assert load_weights(archive(tmp_path / "again.pt")).keys() == STATE.keys()


def test_what_a_small_file_would_blow_up_is_not_loaded(tmp_path, monkeypatch):
    loaded = []
    monkeypatch.setattr(torch, "load", lambda *arguments, **options: loaded.append(arguments))
    os.mkfifo(tmp_path / "pipe.pt")
    (tmp_path / "old.pt").write_bytes(CALL)
    for path, message in [
        (archive(tmp_path / "small.pt", zipfile.ZIP_DEFLATED), "is compressed, which torch.save does not do"),
        (archive(tmp_path / "large.pt", size=10**9), "has entries that are larger than the file"),
        (archive(tmp_path / "new.pt", pickled=CALL), "holds a bytearray, which no weights need"),
        (tmp_path / "old.pt", "holds a bytearray, which no weights need"),
        (tmp_path / "pipe.pt", "is no file"),
    ]:
        with pytest.raises(ValueError, match=f"^{re.escape(message)}$"):
            load_weights(path)
    assert loaded == []


def test_what_is_no_plain_data(tmp_path):
    torch.save({"path": tmp_path}, tmp_path / "object.pt")
    (tmp_path / "half.pt").write_bytes(archive(tmp_path / "whole.pt").read_bytes()[:300])
    (tmp_path / "empty.pt").write_bytes(b"")
    for name in ("object.pt", "half.pt", "empty.pt"):
        with pytest.raises(ValueError, match="^cannot be read as plain data; it is damaged, or holds code$"):
            load_weights(tmp_path / name)
