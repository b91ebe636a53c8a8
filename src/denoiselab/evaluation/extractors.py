"""The extractors that numbers are published in, through torch-fidelity.

A number's name says what its features are: `label` is "" for Inception's published weights alone, else "digits", "vgg16", …,
and `<family>_unpublished_<first 8 hex digits of the file's SHA-256>` for a file that is not the published one.
"""

from __future__ import annotations

import warnings
from pathlib import Path
from typing import Any, Literal

import torch
from torch import Tensor, nn

from denoiselab.condition import height_width
from denoiselab.evaluation.features import Extractor
from denoiselab.evaluation.published import TENSORFLOW_RESIZE, Published, TorchFidelityNetwork

# Published files carry the first digits of their SHA-256 in their name
INCEPTION_FILE = "weights-inception-2015-12-05-6726825d.pth"
INCEPTION_URL = f"https://github.com/toshas/torch-fidelity/releases/download/v0.2.0/{INCEPTION_FILE}"
INCEPTION_SHA256 = "6726825d"
VGG16_URL = "https://download.pytorch.org/models/vgg16-397923af.pth"
VGG16_SHA256 = "397923af"


class DigitsExtractor(Extractor):
    """The penultimate features (64) and the logits (10) of the digits classifier, for 8x8 grey images.

    Args:
        weights: a file written by `scripts/make_digits_classifier.py`, whose numbers are marked; None takes the one
            that is shipped.
    """

    name = "digits"
    resize = "none (8x8)"
    num_classes = 10
    shipped = Path(__file__).parent / "assets" / "digits_classifier.safetensors"

    def __init__(self, *, weights: str | None = None) -> None:
        super().__init__()
        self.weights = Path(weights) if weights is not None else self.shipped

    @property
    def label(self) -> str:
        """See `Extractor.label`."""
        same = self.weights == self.shipped or self.weights.read_bytes() == self.shipped.read_bytes()
        return "digits" if same else f"digits_unpublished_{self.weights_sha256[:8]}"

    def check(self, *, channels: int, resolution: int | list[int]) -> None:
        """See `Extractor.check`."""
        if channels != 1:
            raise ValueError(f"channels={channels}: the digits extractor takes grey images, 1")
        if height_width(resolution) != (8, 8):
            raise ValueError(f"resolution={resolution}: the digits extractor takes 8")
        if not self.weights.is_file():
            raise ValueError(f"weights={self.weights}: no such file; null takes the one that comes with denoiselab")

    def _build(self) -> nn.Module:
        from denoiselab.evaluation.digits_classifier import NAME, DigitsFeatureExtractor

        network = DigitsFeatureExtractor(NAME, ["penultimate", "logits"], str(self.weights))
        return TorchFidelityNetwork(network, channels=1)


class InceptionExtractor(Published):
    """The features of FID: Inception-v3's last pooling (2048), and the logits (1008) of the Inception Score.

    Heusel et al. 2017, "GANs trained by a two time-scale update rule converge to a local Nash equilibrium",
    section 3; the published weights are those of the TensorFlow graph of 2015-12-05. The logits are without the bias,
    as the Inception Score has them in that graph; their classes are ImageNet's: no accuracy is taken from them.

    Args:
        weights: a state dict for torch-fidelity's Inception; None looks in torch.hub's cache, where
            torch-fidelity itself would put the published file.
        allow_other_weights: whether a file other than the published one is accepted; its distances are then
            called `fd_inception_unpublished_…`, never FID.
        spatial: whether the spatial features of sFID (2023) are computed too: the first 7 channels, of 17x17, after the
            1x1 branch of the block that TensorFlow's graph calls mixed_6, as ADM's evaluator takes them (Nash et al.
            2021, "Generating images with sparse representations"; Dhariwal & Nichol 2021) and in its order: row, column,
            channel.
    """

    name = "inception-v3-compat"
    resize = TENSORFLOW_RESIZE.format(299)
    published_label = ""
    family = "inception"

    def __init__(self, *, weights: str | None = None, allow_other_weights: bool = False, spatial: bool = False) -> None:
        super().__init__(
            weights=weights,
            allow_other_weights=allow_other_weights,
            url=INCEPTION_URL,
            file=INCEPTION_FILE,
            sha256=INCEPTION_SHA256,
        )
        self.spatial = spatial

    def _load(self) -> nn.Module:
        from torch_fidelity import FeatureExtractorInceptionV3

        return FeatureExtractorInceptionV3(self.name, ["2048", "logits_unbiased"], str(self.weights))

    def _wrap(self, network: Any) -> nn.Module:
        return TorchFidelityNetwork(network, spatial=network.Mixed_6d.branch1x1 if self.spatial else None)


class VGG16Extractor(Published):
    """The second hidden layer (4096, after the ReLU) of torchvision's VGG16 (Simonyan & Zisserman 2015).

    Args:
        weights: a state dict for torchvision's VGG16; None looks in torch.hub's cache.
        allow_other_weights: whether a file other than the published one is accepted, which marks every number.
    """

    name = "vgg16"
    resize = f"{TENSORFLOW_RESIZE.format(224)}; ImageNet's mean and standard deviation"
    published_label = family = "vgg16"

    def __init__(self, *, weights: str | None = None, allow_other_weights: bool = False) -> None:
        super().__init__(
            weights=weights,
            allow_other_weights=allow_other_weights,
            url=VGG16_URL,
            file=VGG16_URL.rpartition("/")[2],
            sha256=VGG16_SHA256,
        )

    def _load(self) -> nn.Module:
        from torch_fidelity import FeatureExtractorVGG16

        return FeatureExtractorVGG16(self.name, ["fc2_relu"], str(self.weights))


CLIPModel = Literal[
    "clip-rn50",
    "clip-rn101",
    "clip-rn50x4",
    "clip-rn50x16",
    "clip-rn50x64",
    "clip-vit-b-32",
    "clip-vit-b-16",
    "clip-vit-l-14",
    "clip-vit-l-14-336px",
]
CLIP_RESOLUTION = {"clip-rn50x4": 288, "clip-rn50x16": 384, "clip-rn50x64": 448, "clip-vit-l-14-336px": 336}


class CLIPExtractor(Published):
    """The image embedding of a CLIP model (Radford et al. 2021).

    Args:
        model: which one, as torch-fidelity calls it.
        weights: OpenAI's TorchScript file; None looks in torch.hub's cache, where torch-fidelity would put it.
        allow_other_weights: whether a file other than the published one is accepted, which marks every number.

    Raises:
        ValueError: if torch-fidelity has no such model.
    """

    def __init__(
        self, *, model: CLIPModel = "clip-vit-b-32", weights: str | None = None, allow_other_weights: bool = False
    ) -> None:
        from torch_fidelity.feature_extractor_clip import MODEL_METADATA, MODEL_URLS

        if model not in MODEL_URLS:
            raise ValueError(f"model={model}: must be one of {', '.join(MODEL_URLS)}")
        sha256 = MODEL_METADATA[model]["hash"]
        super().__init__(
            weights=weights,
            allow_other_weights=allow_other_weights,
            url=MODEL_URLS[model],
            file=f"{model}-{sha256}.pt",
            sha256=sha256,
        )
        self.name, self.resolution = model, CLIP_RESOLUTION.get(model, 224)
        self.resize = f"{TENSORFLOW_RESIZE.format(self.resolution)}; CLIP's mean and standard deviation"
        self.published_label = self.family = model.replace("-", "_")

    def _read(self) -> dict[str, Tensor]:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")  # torch.jit is old, and so are the files
            return torch.jit.load(self.weights, map_location="cpu").state_dict()

    def _load(self) -> nn.Module:
        from torch_fidelity import FeatureExtractorCLIP

        network = FeatureExtractorCLIP(self.name, ["clip"], str(self.weights))
        if network.resolution != self.resolution:
            raise ValueError(f"takes images of {network.resolution}, not {self.resolution}")
        return network
