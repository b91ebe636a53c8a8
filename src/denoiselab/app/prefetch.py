"""`denoiselab-prefetch`: fetch, where there is a network, what a run without one will read; nothing else ever fetches it."""

from __future__ import annotations

import socket
import sys
import zipfile
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from functools import partial
from http.client import HTTPException
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import Any, NamedTuple

import torch

from denoiselab.app.build import TRAIN_KEYS
from denoiselab.app.nodes import check_keys, make, make_node
from denoiselab.codecs.sd_vae import FILES
from denoiselab.evaluation.published import Download, Published
from denoiselab.evaluation.reference import published

SD_VAE = "denoiselab.codecs.sd_vae.SDVAE"
SD_VAE_URL = "https://huggingface.co/stabilityai/sd-vae-ft-ema/resolve/main"  # the one that DiT and SiT use
PATIENCE = 60  # seconds without an answer


class Need(NamedTuple):
    """What a node of the config needs.

    Args:
        name: the node's path.
        downloads: what can be fetched, where it is not there.
        check: raises a ValueError unless all is there and right; returns what more there is to say.
    """

    name: str
    downloads: list[Download]
    check: Callable[[], str]


def prefetch(config: dict[str, Any], choices: dict[str, str], overrides: list[str]) -> None:
    """Fetch what a run of this config needs and say what was put where; exit code 1 if something is not to be had.

    Raises:
        ConfigError: if a value is wrong.
    """
    check_keys(config, TRAIN_KEYS)
    with _patience():
        complete = [_provide(need) for need in _needs(config)]  # all of them, whatever fails
    if not all(complete):
        sys.exit(1)


def _provide(need: Need) -> bool:
    """Fetch what is missing, check, and print; whether all is there."""
    complete, state, told = True, "incomplete", list[str]()
    for download in need.downloads:
        there = download.path.exists()
        try:
            if not there:
                fetch(download)
            told.append(f"  {download.path} ({'there already' if there else f'from {download.url}'})")
        except ValueError as error:
            print(f"error: {need.name}: {error}", file=sys.stderr)
            complete = False
    if complete:
        try:
            state = f"checked{need.check()}"
        except ValueError as error:
            message = " ".join(str(error).split())
            print(f"error: {need.name}: {message.removeprefix(f'{need.name}.')}", file=sys.stderr)
            complete = False
    print("\n".join([f"{need.name}: {state}", *told]), flush=True)
    return complete


def fetch(download: Download) -> None:
    """Fetch a file to its place, whole and with the right hash or not at all; a ZIP is unpacked there.

    Raises:
        ValueError: in one line, if it cannot be had.
    """
    url, path = download.url, download.path
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
        if not url.endswith(".zip"):
            torch.hub.download_url_to_file(url, str(path), download.sha256, progress=sys.stderr.isatty())
            return
        with TemporaryDirectory(dir=path.parent, prefix=".prefetch-") as scratch:
            torch.hub.download_url_to_file(url, f"{scratch}/archive.zip", progress=sys.stderr.isatty())
            with zipfile.ZipFile(f"{scratch}/archive.zip") as archive:
                archive.extractall(f"{scratch}/unpacked")
            (folder,) = Path(scratch, "unpacked").iterdir()  # GitHub packs one folder
            folder.rename(path)
    except (OSError, RuntimeError, HTTPException, ValueError, zipfile.BadZipFile) as error:
        reason = " ".join(str(error).split()) or type(error).__name__
        raise ValueError(f"could not fetch {url} to {path} ({reason})") from error


@contextmanager
def _patience() -> Iterator[None]:
    """A network that does not answer is an error, after a while."""
    before = socket.getdefaulttimeout()
    socket.setdefaulttimeout(PATIENCE)
    try:
        yield
    finally:
        socket.setdefaulttimeout(before)


# --- what a config needs ---


def _needs(config: dict[str, Any]) -> list[Need]:
    return [Need("datamodule", [], partial(_data, config)), *_codec(config), *_metrics(config["metrics"])]


def _data(config: dict[str, Any]) -> str:
    """Let the datamodule download what it can, unless its files are there."""
    node = config["datamodule"]
    if "download" not in node:
        make(config, "datamodule").check()
        return ", there already"
    data = make_node(node | {"download": False}, "datamodule")
    try:
        data.check()
    except ValueError:
        make_node(node | {"download": True}, "datamodule").prepare_data()
        data.check()
        return f", downloaded by torchvision to {node['root']}"
    return ", there already"


def _codec(config: dict[str, Any]) -> list[Need]:
    node = config["codec"]
    if node["_target_"] != SD_VAE:
        return []
    folder = node["weights"]
    files = [] if folder is None else [Download(f"{SD_VAE_URL}/{name}", Path(folder, name), None) for name in FILES]

    def check() -> str:
        make(config, "codec")
        return "; it can be read, there is no hash to hold it to"

    return [Need("codec", files, check)]


def _metrics(node: dict[str, Any]) -> list[Need]:
    nodes = {name: value for name, value in node["extractors"].items() if value is not None}
    extractors = {name: make_node(value, f"metrics.extractors.{name}") for name, value in nodes.items()}
    needs = [
        Need(f"metrics.extractors.{name}", extractor.downloads(), partial(_extractor, extractor))
        for name, extractor in extractors.items()
        if isinstance(extractor, Published)
    ]
    for name, path in (node.get("references") or {}).items():
        if path is None:
            continue
        needs.append(Need(f"metrics.references.{name}", [], partial(_reference, path)))
    return needs


def _extractor(extractor: Published) -> str:
    extractor.check_files()
    return "" if extractor.published else f"; not a known file, its numbers are marked {extractor.label}"


def _reference(path: str) -> str:
    published(Path(path))
    return f", there already: {path}"
