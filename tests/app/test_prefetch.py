"""Fetching ahead, from stand-ins on this machine: what is put where, and what is said if it cannot be had."""

from __future__ import annotations

import hashlib
import shutil
import socket
import tarfile
import threading
import zipfile
from functools import partial
from http.server import HTTPServer, SimpleHTTPRequestHandler

import pytest
import torch
import yaml
from calls import CONF, call, composed, files_below, run_script

from denoiselab.app import prefetch as app
from denoiselab.app.nodes import make_node
from denoiselab.evaluation import dinov2, extractors
from denoiselab.evaluation.features import Extractor
from denoiselab.evaluation.published import Download
from denoiselab.runs.checks import check_types
from stand_ins import write_cifar10

CACHE = "hub/checkpoints"


@pytest.fixture(autouse=True)
def home(tmp_path, monkeypatch):
    """torch.hub's folder, empty."""
    monkeypatch.setenv("TORCH_HOME", str(tmp_path / "home"))
    return tmp_path / "home"


@pytest.fixture
def web(tmp_path):
    """A folder and its address on a server of this machine."""
    folder = tmp_path / "web"
    folder.mkdir()

    class Quiet(SimpleHTTPRequestHandler):
        def log_message(self, *_):
            pass

    server = HTTPServer(("127.0.0.1", 0), partial(Quiet, directory=str(folder)))
    thread = threading.Thread(target=server.serve_forever)
    thread.start()
    yield folder, f"http://127.0.0.1:{server.server_port}"
    server.shutdown()
    thread.join()
    server.server_close()


@pytest.fixture
def published(web, monkeypatch):
    """A file in the place of Inception's, on the server."""
    folder, address = web
    file = folder / extractors.INCEPTION_FILE
    torch.save({"x": torch.arange(3.0)}, file)
    monkeypatch.setattr(extractors, "INCEPTION_URL", f"{address}/{file.name}")
    monkeypatch.setattr(extractors, "INCEPTION_SHA256", hashlib.sha256(file.read_bytes()).hexdigest()[:8])
    return file


def test_nothing_is_needed_for_the_default_run(tmp_path):
    done = run_script("prefetch", cwd=tmp_path)
    assert (done.code, done.err) == (0, "")
    assert done.out == "datamodule: checked, there already\n"
    assert files_below(tmp_path) == []


def test_it_takes_what_train_takes():
    text = yaml.safe_load((CONF / "prefetch.yaml").read_text())
    assert text["defaults"] == ["train", "_self_"]
    assert set(text) == {"defaults", "hydra"}
    assert composed("experiment=edm_ddpmpp_cifar10", "metrics=fid")["metrics"]["extractors"]


@pytest.mark.parametrize("choice", sorted(file.stem for file in (CONF / "metrics" / "extractor").glob("*.yaml")))
def test_every_extractor_of_conf_is_built_without_its_files(choice, home):
    config = composed("metrics=digits", f"+metrics/extractor@metrics.extractors.more={choice}")
    check_types(config)
    extractor = make_node(config["metrics"]["extractors"]["more"], "metrics.extractors.more")
    assert isinstance(extractor, Extractor)
    assert not home.exists()


def test_weights_are_fetched_checked_and_not_fetched_again(published, home, tmp_path):
    done = call("prefetch", "metrics=fid", cwd=tmp_path)
    assert (done.code, done.err) == (0, "")
    put = home / CACHE / published.name
    assert put.read_bytes() == published.read_bytes()
    assert "metrics.extractors.inception: checked\n" in done.out
    assert f"  {put} (from {extractors.INCEPTION_URL})\n" in done.out
    assert files_below(home) == ["hub", CACHE, f"{CACHE}/{published.name}"]  # nothing half-done stays
    published.unlink()
    again = call("prefetch", "metrics=fid", cwd=tmp_path)
    assert again.code == 0
    assert f"  {put} (there already)\n" in again.out


def test_a_path_that_is_given_is_where_the_file_goes(published, home, tmp_path):
    place = tmp_path / "mine" / "inception.pth"
    done = call("prefetch", "metrics=fid", f"metrics.extractors.inception.weights={place}", cwd=tmp_path)
    assert done.code == 0
    assert place.read_bytes() == published.read_bytes()
    assert not home.exists()


def test_a_wrong_hash_leaves_nothing_and_a_wrong_file_is_left_alone(published, home, tmp_path):
    published.write_bytes(b"something else")
    done = call("prefetch", "metrics=fid", cwd=tmp_path)
    assert done.code == 1
    assert done.err.count("\n") == 1
    assert "invalid hash" in done.err
    assert files_below(home) == ["hub", CACHE]
    put = home / CACHE / published.name
    put.write_bytes(b"mine")
    done = call("prefetch", "metrics=fid", cwd=tmp_path)
    assert done.code == 1
    assert done.err.startswith(f"error: metrics.extractors.inception: weights={put}: SHA-256 must begin with ")
    assert put.read_bytes() == b"mine"
    allowed = call("prefetch", "metrics=fid", "metrics.extractors.inception.allow_other_weights=true", cwd=tmp_path)
    assert allowed.code == 0
    assert "its numbers are marked inception_unpublished_" in allowed.out


def test_what_cannot_be_reached_is_one_line_each_and_the_rest_is_fetched(published, home, tmp_path, monkeypatch):
    with socket.socket() as closed:  # a port that nothing listens on
        closed.bind(("127.0.0.1", 0))
        monkeypatch.setattr(extractors, "VGG16_URL", f"http://127.0.0.1:{closed.getsockname()[1]}/vgg16.pth")
        choices = ["metrics=fid", "+metrics/extractor@metrics.extractors.vgg16=vgg16"]
        done = call("prefetch", *choices, "datamodule=imagenet", cwd=tmp_path)
    assert done.code == 1
    data, vgg16 = done.err.splitlines()
    assert data.startswith("error: datamodule: root=null: give a folder with train/")
    assert vgg16.startswith(f"error: metrics.extractors.vgg16: could not fetch {extractors.VGG16_URL} to {home}")
    assert (home / CACHE / published.name).is_file()
    lines = done.out.splitlines()
    assert [line for line in lines if line.endswith("incomplete")] == [lines[0], "metrics.extractors.vgg16: incomplete"]


def test_a_server_that_does_not_answer_is_given_up(tmp_path, monkeypatch):
    monkeypatch.setattr(app, "PATIENCE", 0.2)
    with socket.create_server(("127.0.0.1", 0)) as silent:
        monkeypatch.setattr(extractors, "INCEPTION_URL", f"http://127.0.0.1:{silent.getsockname()[1]}/x.pth")
        done = call("prefetch", "metrics=fid", cwd=tmp_path)
    assert done.code == 1
    assert "timed out" in done.err
    assert socket.getdefaulttimeout() is None


def test_code_is_unpacked_and_checked(web, home, tmp_path, monkeypatch):
    folder, address = web
    with zipfile.ZipFile(folder / "commit.zip", "w") as archive:
        archive.writestr("dinov2-commit/hubconf.py", "dependencies = []\n")
    torch.save({}, folder / "dinov2_vits14_pretrain.pth")
    name = hashlib.sha256(b"dependencies = []\n").hexdigest()
    monkeypatch.setattr(dinov2, "DINOV2_CODE_URL", f"{address}/commit.zip")
    monkeypatch.setattr(dinov2, "DINOV2_URL", address + "/{0}_pretrain.pth")
    digest = hashlib.sha256((folder / "dinov2_vits14_pretrain.pth").read_bytes()).hexdigest()
    monkeypatch.setitem(dinov2.DINOV2_SHA256, "dinov2-vit-s-14", digest)
    choices = ["metrics=fid", "~metrics.extractors.inception", "+metrics/extractor@metrics.extractors.dinov2=dinov2"]
    done = call("prefetch", *choices, cwd=tmp_path)
    assert done.code == 1
    assert "must be commit" in done.err  # what was unpacked is held to the commit
    monkeypatch.setattr(dinov2, "DINOV2_CODE_SHA256", hashlib.sha256(f"hubconf.py {name}\n".encode()).hexdigest())
    done = call("prefetch", *choices, cwd=tmp_path)
    assert (done.code, done.err) == (0, "")
    (code,) = (home / "hub").glob("facebookresearch_dinov2_*")
    assert files_below(code) == ["hubconf.py"]
    assert sorted(path.name for path in (home / "hub").iterdir()) == ["checkpoints", code.name]


def test_data_is_downloaded_where_the_datamodule_can(web, tmp_path, monkeypatch):
    from torchvision.datasets import CIFAR10

    folder, address = web
    write_cifar10(folder / "cifar-10-batches-py", per_batch=10)
    with tarfile.open(folder / "cifar.tar.gz", "w:gz") as archive:
        archive.add(folder / "cifar-10-batches-py", "cifar-10-batches-py")
    monkeypatch.setattr("denoiselab.data.cifar10.COUNTS", {"train": 50, "test": 10})
    monkeypatch.setattr(CIFAR10, "url", f"{address}/cifar.tar.gz")
    digest = hashlib.md5((folder / "cifar.tar.gz").read_bytes(), usedforsecurity=False).hexdigest()
    monkeypatch.setattr(CIFAR10, "tgz_md5", digest)
    choice = ["datamodule=cifar10", f"datamodule.root={tmp_path / 'data'}"]
    done = call("prefetch", *choice, cwd=tmp_path)
    assert done.code == 0, done.err
    assert f"datamodule: checked, downloaded by torchvision to {tmp_path / 'data'}" in done.out
    again = call("prefetch", *choice, cwd=tmp_path)
    assert again.out == "datamodule: checked, there already\n"
    nowhere = call("prefetch", "datamodule=cifar10", cwd=tmp_path)
    assert nowhere.code == 1
    assert nowhere.err.startswith("error: datamodule: root=null: with download=true, give the folder to download into")


def test_the_autoencoder_of_latents_is_fetched(web, tmp_path, monkeypatch, autoencoder_folder):
    folder, address = web
    shutil.copytree(autoencoder_folder, folder, dirs_exist_ok=True)
    monkeypatch.setattr(app, "SD_VAE_URL", address)
    choice = ["codec=sd_vae", f"codec.weights={tmp_path / 'vae'}"]
    done = call("prefetch", *choice, cwd=tmp_path)
    assert done.code == 0, done.err
    assert "codec: checked" in done.out
    assert files_below(tmp_path / "vae") == files_below(autoencoder_folder)
    (tmp_path / "vae" / "diffusion_pytorch_model.safetensors").write_bytes(b"x")
    done = call("prefetch", *choice, cwd=tmp_path)
    assert done.code == 1
    assert done.err.startswith(f"error: codec: weights={tmp_path / 'vae'}: cannot be read")


def test_published_statistics_must_be_there(published, tmp_path):
    done = call("prefetch", "metrics=fid", "+metrics.references.inception=none.npz", cwd=tmp_path)
    assert done.code == 1
    assert done.err.startswith("error: metrics.references.inception: none.npz: no such file")


def test_mistakes_in_the_config_are_one_line_before_anything_is_fetched(home, tmp_path):
    done = call("prefetch", "metrics=fid", "metrics.extractors.inception.spatial=3", cwd=tmp_path)
    assert (done.code, done.out) == (2, "")
    assert done.err == "config error: metrics.extractors.inception.spatial=3: must be true or false\n"
    assert not home.exists()


def test_an_archive_that_is_none_leaves_nothing(web, tmp_path):
    folder, address = web
    (folder / "broken.zip").write_bytes(b"x")
    with pytest.raises(ValueError, match=r"could not fetch .*broken\.zip to .*not a zip file"):
        app.fetch(Download(f"{address}/broken.zip", tmp_path / "here" / "code", None))
    assert files_below(tmp_path / "here") == []
