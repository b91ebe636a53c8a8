"""DINOv2's features, whose code has to be had from elsewhere as well."""

from __future__ import annotations

import hashlib
import os
import sys
import tempfile
from functools import cached_property
from pathlib import Path
from typing import Literal

import torch
from torch import nn

from denoiselab.evaluation.published import TENSORFLOW_RESIZE, Download, Published

DINOV2_URL = "https://dl.fbaipublicfiles.com/dinov2/{0}/{0}_pretrain.pth"
DINOV2_SHA256 = {  # not published by Meta: what independent public projects recorded of Meta's files
    "dinov2-vit-s-14": "b938bf1bc15cd2ec0feacfe3a1bb553fe8ea9ca46a7e1d8d00217f29aef60cd9",
    "dinov2-vit-b-14": "0b8b82f85de91b424aded121c7e1dcc2b7bc6d0adeea651bf73a13307fad8c73",
    "dinov2-vit-l-14": "d5383ea8f4877b2472eb973e0fd72d557c7da5d3611bd527ceeb1d7162cbf428",
}
DINOV2_COMMIT = "e1277af2ba9496fbadf7aec6eba56e8d882d1e35"  # 2024-02-22
DINOV2_CODE_URL = f"https://github.com/facebookresearch/dinov2/archive/{DINOV2_COMMIT}.zip"
DINOV2_CODE_SHA256 = "294567e424e6bd33671f1f237c56693fa1eb59ef0eea33aa0ef2d6fa42e7919c"  # `code_sha256` of that commit


class DINOv2Extractor(Published):
    """The class token of a DINOv2 model (Oquab et al. 2023).

    The model's code is not in torch-fidelity, which fetches the newest from GitHub at run time and runs it; here it is one
    commit of it in a local folder, checked file by file. Its authors publish no hash of their weights: they are held to the
    one that independent projects recorded and, where there is none (dinov2-vit-g-14), need `allow_other_weights`.

    Args:
        model: which one, as torch-fidelity calls it.
        weights: Meta's state dict; None looks in torch.hub's cache.
        code: the folder of the repository; None looks in torch.hub's cache.
        allow_other_weights: whether a file with another hash is accepted, which marks every number; the code is that
            commit's in any case.

    Raises:
        ValueError: if torch-fidelity has no such model.
    """

    def __init__(
        self,
        *,
        model: Literal["dinov2-vit-s-14", "dinov2-vit-b-14", "dinov2-vit-l-14", "dinov2-vit-g-14"] = "dinov2-vit-s-14",
        weights: str | None = None,
        code: str | None = None,
        allow_other_weights: bool = False,
    ) -> None:
        from torch_fidelity.feature_extractor_dinov2 import MODEL_METADATA

        if model not in MODEL_METADATA:
            raise ValueError(f"model={model}: must be one of {', '.join(MODEL_METADATA)}")
        self.entry: str = MODEL_METADATA[model]
        url = DINOV2_URL.format(self.entry)
        super().__init__(
            weights=weights,
            allow_other_weights=allow_other_weights,
            url=url,
            file=url.rpartition("/")[2],
            sha256=DINOV2_SHA256.get(model),
        )
        cached = Path(torch.hub.get_dir(), f"facebookresearch_dinov2_{DINOV2_COMMIT}")
        self.name, self.code = model, Path(code) if code is not None else cached
        self.resize = (
            f"{TENSORFLOW_RESIZE.format(224)}; ImageNet's mean and standard deviation; code {DINOV2_COMMIT[:7]}"
        )
        self.published_label = self.family = model.replace("-", "_")

    def downloads(self) -> list[Download]:
        """See `Published.downloads`."""
        return [*super().downloads(), Download(DINOV2_CODE_URL, self.code, None)]

    @cached_property
    def code_sha256(self) -> str:
        """SHA-256 (hex) over the names and SHA-256 of all Python files in the folder of the code."""
        return _sha256(_python_files(self.code))

    def check_files(self) -> None:
        """See `Published.check_files`."""
        super().check_files()
        if not (self.code / "hubconf.py").is_file():
            raise ValueError(
                f"code={self.code}: holds no hubconf.py; denoiselab-prefetch fetches it, or fetch {DINOV2_CODE_URL} and "
                "unpack it there, so that hubconf.py lies in that folder, or give the path of your copy"
            )
        _checked(self.code, self.code_sha256)

    def _load(self) -> nn.Module:
        from torch_fidelity import FeatureExtractorBase, FeatureExtractorDinoV2

        os.environ["XFORMERS_DISABLED"] = "1"  # as torch-fidelity does: one kind of attention
        code = _copy(self.code)
        imported = getattr(sys.modules.get("dinov2"), "__file__", None)
        if imported is not None and not Path(imported).is_relative_to(code):
            raise ValueError(f"another dinov2 is imported already, {imported}")
        model = torch.hub.load(str(code), self.entry, source="local", pretrained=False)
        model.load_state_dict(self._read())
        network = FeatureExtractorDinoV2.__new__(FeatureExtractorDinoV2)  # its constructor would fetch
        FeatureExtractorBase.__init__(network, self.name, ["dinov2"])
        network.model, network.feature_extractor_internal_dtype = model, torch.float32
        return network


def _python_files(code: Path) -> dict[str, bytes]:
    """What is in the Python files below a folder, by their names there."""
    return {path.relative_to(code).as_posix(): path.read_bytes() for path in code.rglob("*.py") if path.is_file()}


def _sha256(files: dict[str, bytes]) -> str:
    total = hashlib.sha256()
    for name, content in sorted(files.items()):
        total.update(f"{name} {hashlib.sha256(content).hexdigest()}\n".encode())
    return total.hexdigest()


def _checked(code: Path, sha256: str) -> None:
    if sha256 != DINOV2_CODE_SHA256:
        raise ValueError(f"code={code}: must be commit {DINOV2_COMMIT} of {DINOV2_CODE_URL}, unchanged")


_COPIES: dict[str, tempfile.TemporaryDirectory[str]] = {}  # by hash, until the process ends: it may import more of one


def _copy(code: Path) -> Path:
    """A new folder with the bytes that were hashed and nothing else: beside them Python would run compiled files too."""
    files = _python_files(code)
    sha256 = _sha256(files)
    _checked(code, sha256)
    if sha256 not in _COPIES:
        _COPIES[sha256] = tempfile.TemporaryDirectory(prefix="dinov2-")
        for name, content in files.items():
            path = Path(_COPIES[sha256].name, name)
            path.parent.mkdir(parents=True, exist_ok=True)
            path.write_bytes(content)
    return Path(_COPIES[sha256].name)
