from __future__ import annotations

import json
import pickle
import re
from argparse import Namespace

import pytest
import torch
from safetensors.torch import load_file, save_file

from denoiselab.exchange.files import read, write_safetensors

STATE = {"a": torch.randn(2, 3), "b": torch.randn(4)}


def assert_read(path):
    state = read(path).state
    assert state.keys() == STATE.keys()
    assert all(torch.equal(state[name], STATE[name]) for name in STATE)


@pytest.mark.parametrize("name", ["w.safetensors", "w.pt", "w.pth", "w.bin"])
def test_a_file_of_weights(name, tmp_path):
    save = save_file if name.endswith("safetensors") else torch.save
    save(STATE, tmp_path / name)
    assert_read(tmp_path / name)


def test_of_a_training_checkpoint_the_averages(tmp_path):
    torch.save({"model": {"a": torch.zeros(1)}, "ema": STATE, "opt": {"lr": 0.1}}, tmp_path / "w.pt")
    assert_read(tmp_path / "w.pt")


@pytest.mark.parametrize("model", ["", "unet", "transformer"])
@pytest.mark.parametrize("weights", ["safetensors", "bin", "several"])
def test_a_folder_of_diffusers(weights, model, tmp_path):
    folder = tmp_path / model
    folder.mkdir(exist_ok=True)
    (folder / "config.json").write_text('{"_class_name": "UNet2DModel"}')
    name = folder / f"diffusion_pytorch_model.{weights}"
    if weights == "several":
        for key, tensor in STATE.items():
            save_file({key: tensor}, folder / f"part-{key}.safetensors")
        index = {"weight_map": {key: f"part-{key}.safetensors" for key in STATE}}
        (folder / "diffusion_pytorch_model.safetensors.index.json").write_text(json.dumps(index))
    else:
        (save_file if weights == "safetensors" else torch.save)(STATE, name)
    scheduler = tmp_path / "scheduler" if model else tmp_path
    scheduler.mkdir(exist_ok=True)
    (scheduler / "scheduler_config.json").write_text('{"beta_schedule": "linear"}')
    (tmp_path / "model_index.json").write_text('{"_class_name": "DDIMPipeline"}')
    for path in (tmp_path, folder):
        assert_read(path)
        source = read(path)
        assert source.model == {"_class_name": "UNet2DModel"}
        assert source.scheduler == {"beta_schedule": "linear"}
        assert source.pipeline == {"_class_name": "DDIMPipeline"}


@pytest.mark.parametrize(
    ("name", "content", "message"),
    [
        ("none.pt", None, "no such file or folder"),
        ("w.npz", b"", "must be a .safetensors, .pt, .pth or .bin file, or a diffusers folder"),
        ("w.safetensors", b"no tensors", "cannot be read as plain data; it is damaged, or holds code"),
        ("w.pt", b"no tensors", "cannot be read as plain data; it is damaged, or holds code"),
        ("w.pt", {"args": Namespace(a=1)}, "cannot be read as plain data; it is damaged, or holds code"),
        ("w.pt", [1, 2], "holds no state dict, which is names and tensors"),
        ("w.pt", {}, "holds no state dict, which is names and tensors"),
        ("w.pt", {"a": 1}, "holds no state dict, which is names and tensors"),
        ("w.pt", {"a": torch.zeros(1).expand(10**9)}, "holds tensors that are larger than the file"),
        ("w.pt", b"\x80\x02cbuiltins\nbytearray\nJ\0\0\0\x10\x85R.", "holds a bytearray, which no weights need"),
    ],
)
def test_what_cannot_be_read(name, content, message, tmp_path):
    path = tmp_path / name
    if isinstance(content, bytes):
        path.write_bytes(content)
    elif content is not None:
        torch.save(content, path)
    with pytest.raises(ValueError, match=f"^{re.escape(f'source={path}: {message}')}$"):
        read(path)


def test_a_pickle_is_not_opened(tmp_path):
    class Evil:
        def __reduce__(self):
            return (tmp_path / "harmed").touch, ()

    (tmp_path / "net.pkl").write_bytes(pickle.dumps(Evil()))
    with pytest.raises(ValueError, match=r"net.pkl: is a pickle.*torch.save\(.*\.state_dict\(\), 'net.pt'\)"):
        read(tmp_path / "net.pkl")
    assert not (tmp_path / "harmed").exists()


def test_folders_without_a_model(tmp_path):
    with pytest.raises(ValueError, match="has no config.json, nor in unet/ or transformer/"):
        read(tmp_path)
    (tmp_path / "config.json").write_text("{}")
    with pytest.raises(ValueError, match=r"has no diffusion_pytorch_model.safetensors or .bin"):
        read(tmp_path)
    torch.save(STATE, tmp_path / "diffusion_pytorch_model.bin")
    texts = {"{": "cannot be read as JSON", "[]": "must hold a JSON object", "[" * 10**5: "cannot be read as JSON"}
    for text, message in texts.items():
        (tmp_path / "config.json").write_text(text)
        with pytest.raises(ValueError, match=message):
            read(tmp_path)


@pytest.mark.parametrize("names", [None, [], {}, ["x"], {"a": 3}, {"a": [1]}, {"a": "../w.bin"}, {"a": "/w.bin"}])
def test_an_index_that_names_no_files(names, tmp_path):
    (tmp_path / "config.json").write_text("{}")
    index = tmp_path / "diffusion_pytorch_model.bin.index.json"
    index.write_text(json.dumps({} if names is None else {"weight_map": names}))
    with pytest.raises(ValueError, match=f"^source={index}: must have a weight_map of the names of files beside it$"):
        read(tmp_path)


def test_writing_safetensors(tmp_path):
    write_safetensors(tmp_path / "w.safetensors", STATE | {"t": torch.ones(2, 3).T}, {"config": {"a": 1}})
    assert load_file(tmp_path / "w.safetensors").keys() == STATE.keys() | {"t"}
    assert json.loads((tmp_path / "w.json").read_text()) == {"config": {"a": 1}}
