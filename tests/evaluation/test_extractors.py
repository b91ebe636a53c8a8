"""The published extractors on stand-ins: files with random weights, which torch-fidelity's own code reads."""

from __future__ import annotations

import hashlib
import importlib.util
import os
import re
import sys
import types
import urllib.request
import warnings
from pathlib import Path

import pytest
import torch
from test_features import images
from torch import nn

from denoiselab.evaluation import dinov2, extractors
from denoiselab.evaluation.dinov2 import DINOv2Extractor
from denoiselab.evaluation.extractors import (
    INCEPTION_FILE,
    CLIPExtractor,
    DigitsExtractor,
    InceptionExtractor,
    VGG16Extractor,
)

PUBLISHED = (InceptionExtractor, VGG16Extractor, CLIPExtractor, DINOv2Extractor)


def sha256(path):
    return hashlib.sha256(path.read_bytes()).hexdigest()


@pytest.fixture(autouse=True)
def _no_network(monkeypatch):
    """Nothing may be fetched, whoever asks."""

    def refuse(*arguments, **options):
        pytest.fail(f"a download was tried: {arguments}")

    monkeypatch.setattr(urllib.request, "urlopen", refuse)
    for name in ("urlopen", "download_url_to_file", "load_state_dict_from_url"):
        monkeypatch.setattr(torch.hub, name, refuse)
    from torch_fidelity import feature_extractor_clip, feature_extractor_inceptionv3

    monkeypatch.setattr(feature_extractor_clip, "load_state_dict_from_url", refuse)
    monkeypatch.setattr(feature_extractor_inceptionv3, "load_state_dict_from_url", refuse)


# --- stand-ins ---


class SmallVGG(nn.Module):
    """VGG16 with the same last layers, and few weights."""

    def __init__(self, **_):
        super().__init__()
        self.features = nn.Conv2d(3, 4, 16, stride=56)
        layers = [nn.Linear(64, 16), nn.ReLU(), nn.Dropout(), nn.Linear(16, 12), nn.ReLU(), nn.Dropout()]
        self.classifier = nn.Sequential(*layers, nn.Linear(12, 5))

    def forward(self, x):
        return self.classifier(self.features(x).flatten(1))


@pytest.fixture
def vgg_file(tmp_path, monkeypatch):
    """A state dict of a small VGG, which torchvision is made to build."""
    import torchvision

    monkeypatch.setattr(torchvision.models, "vgg16", SmallVGG)
    torch.save(SmallVGG().state_dict(), tmp_path / "vgg.pth")
    return tmp_path / "vgg.pth"


def script(state, path):
    """A TorchScript archive with these tensors, as OpenAI publishes CLIP."""
    root = nn.Module()
    for key, tensor in state.items():
        *folders, name = key.split(".")
        node = root
        for folder in folders:
            if folder not in node._modules:
                node.add_module(folder, nn.Module())
            node = node._modules[folder]
        node.register_buffer(name, tensor)
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # torch.jit is old
        torch.jit.script(root).save(path)


@pytest.fixture
def clip_file(tmp_path):
    """A CLIP of two narrow layers on images of 224, in OpenAI's format."""
    from torch_fidelity.feature_extractor_clip import CLIPVisual

    network = CLIPVisual(16, 224, 2, 64, 112)
    text = {"text_projection": torch.zeros(8, 16), "logit_scale": torch.zeros(()), "transformer.x": torch.zeros(1)}
    script({**network.state_dict(), **text}, tmp_path / "clip.pt")
    return tmp_path / "clip.pt"


HUBCONF = """
import torch
from torch import nn

dependencies = ["torch"]

class Small(nn.Module):
    def __init__(self):
        super().__init__()
        self.patch = nn.Conv2d(3, 6, 14, stride=14)

    def forward(self, x):
        assert x.shape[1:] == (3, 224, 224)
        return self.patch(x).mean((2, 3))

def dinov2_vits14(*, pretrained=True):
    assert not pretrained
    return Small()
"""


@pytest.fixture
def dinov2_files(tmp_path, monkeypatch):
    """A hubconf.py with a small model in the place of DINOv2's repository, and its weights."""
    code = tmp_path / "code"
    code.mkdir()
    (code / "hubconf.py").write_text(HUBCONF)
    weights = tmp_path / "dinov2.pth"
    torch.save({"patch.weight": torch.randn(6, 3, 14, 14), "patch.bias": torch.randn(6)}, weights)
    monkeypatch.setattr(dinov2, "DINOV2_CODE_SHA256", DINOv2Extractor(code=str(code)).code_sha256)
    monkeypatch.setitem(dinov2.DINOV2_SHA256, "dinov2-vit-s-14", sha256(weights))
    return {"weights": str(weights), "code": str(code)}


# --- what they share ---


@pytest.mark.parametrize("kind", PUBLISHED)
def test_a_missing_file_is_one_line_with_source_and_destination(kind, tmp_path, monkeypatch):
    monkeypatch.setenv("TORCH_HOME", str(tmp_path))
    extractor = kind()
    assert list(tmp_path.iterdir()) == []
    with pytest.raises(ValueError, match="^weights=") as error:
        extractor.check(channels=3, resolution=32)
    message, wanted = str(error.value), extractor.downloads()[0]
    assert "\n" not in message
    assert wanted.url in message
    assert wanted.url.startswith("https://")
    assert str(wanted.path) in message
    assert str(wanted.path).startswith(os.path.join(str(tmp_path), "hub", "checkpoints"))
    with pytest.raises(ValueError, match="no such file"):  # nor without the check
        kind(weights=str(tmp_path / "nowhere"), allow_other_weights=True)(images(1, 3))


@pytest.mark.parametrize("kind", PUBLISHED)
def test_other_weights_are_refused(kind, tmp_path):
    other = tmp_path / "other"
    other.write_bytes(b"x")
    extractor = kind(weights=str(other))
    for use in (lambda: extractor.check(channels=3, resolution=32), lambda: extractor(images(1, 3))):
        with pytest.raises(
            ValueError, match=rf"^weights={other}: SHA-256 must begin with {extractor.sha256[:8]}"
        ) as error:
            use()
        assert sha256(other)[:8] in str(error.value)
        assert "\n" not in str(error.value)


@pytest.mark.parametrize("kind", PUBLISHED)
def test_a_file_that_runs_code_or_is_broken_or_of_something_else_is_refused(kind, tmp_path, dinov2_files, vgg_file):
    torch.save({"x": os.system}, tmp_path / "evil.pth")
    (tmp_path / "broken.pth").write_bytes(b"x")
    torch.save({"x": torch.zeros(1)}, tmp_path / "small.pth")
    script({"x": torch.zeros(1)}, tmp_path / "small.pt")
    more = {"code": dinov2_files["code"]} if kind is DINOv2Extractor else {}
    for name in ("evil.pth", "broken.pth", "small.pt" if kind is CLIPExtractor else "small.pth"):
        extractor = kind(weights=str(tmp_path / name), allow_other_weights=True, **more)
        with pytest.raises(ValueError, match="state dict of plain tensors|not for ") as error:
            extractor.check(channels=3, resolution=32)
        assert "\n" not in str(error.value)
        assert len(str(error.value)) < 500


@pytest.mark.parametrize("kind", PUBLISHED)
def test_images_are_grey_or_rgb(kind):
    with pytest.raises(ValueError, match="^channels=4: "):
        kind().check(channels=4, resolution=32)
    with pytest.raises(ValueError, match="^resolution=0: "):
        kind().check(channels=3, resolution=0)


@pytest.mark.parametrize("kind", [CLIPExtractor, DINOv2Extractor])
def test_a_model_that_torch_fidelity_lacks_is_refused(kind):
    with pytest.raises(ValueError, match="^model=resnet: must be one of .*vit-"):
        kind(model="resnet")


def used(extractor, channels=3):
    """What a checked extractor finds in three images; grey ones count as RGB."""
    extractor.check(channels=channels, resolution=[16, 32])
    grey = images(3)
    before = torch.get_rng_state()
    found = extractor(grey, batch_size=2)
    assert torch.equal(torch.get_rng_state(), before)
    torch.testing.assert_close(extractor(grey.repeat(1, 3, 1, 1)).features, found.features, rtol=1e-4, atol=1e-5)
    assert extractor.num_classes is None
    return grey.repeat(1, 3, 1, 1), found


# --- Inception ---


def test_inception_features_and_logits_are_those_of_torch_fidelity(inception_file):
    from torch_fidelity import FeatureExtractorInceptionV3

    rgb, found = used(InceptionExtractor(weights=str(inception_file), allow_other_weights=True))
    assert found.features.shape == (3, 2048)
    assert found.logits.shape == (3, 1008)
    assert found.spatial is None
    oracle = FeatureExtractorInceptionV3("inception-v3-compat", ["2048", "logits_unbiased"], str(inception_file))
    features, logits = oracle(rgb)
    assert features.std() > 0
    torch.testing.assert_close(found.features, features, rtol=1e-4, atol=1e-6)
    torch.testing.assert_close(found.logits, logits, rtol=1e-4, atol=1e-5)


def test_spatial_features_are_the_first_channels_of_mixed_6_in_adms_order(inception_file):
    extractor = InceptionExtractor(weights=str(inception_file), allow_other_weights=True, spatial=True)
    plain = InceptionExtractor(weights=str(inception_file), allow_other_weights=True)
    found = extractor(images(3, 3), batch_size=2)
    assert found.spatial.shape == (3, 2023)
    torch.testing.assert_close(found.features, plain(images(3, 3), batch_size=2).features)
    assert extractor.hash == plain.hash
    network, seen = extractor._network.network, []
    handle = network.Mixed_6d.register_forward_hook(lambda module, inputs, output: seen.append(output))
    again = extractor(images(3, 3), batch_size=2)
    handle.remove()
    branch = torch.cat(seen)[:, :7]  # the block begins with its 1x1 branch
    assert branch.shape == (3, 7, 17, 17)
    assert branch.min() == 0  # after the ReLU
    torch.testing.assert_close(again.spatial.reshape(3, 17, 17, 7), branch.permute(0, 2, 3, 1))
    torch.testing.assert_close(again.spatial, found.spatial)


def test_inception_is_fid_for_the_published_file_alone(inception_file, monkeypatch):
    other = InceptionExtractor(weights=str(inception_file), allow_other_weights=True)
    assert other.label == f"inception_unpublished_{sha256(inception_file)[:8]}"
    monkeypatch.setattr(extractors, "INCEPTION_SHA256", sha256(inception_file)[:8])
    for allowed in (True, False):
        published = InceptionExtractor(weights=str(inception_file), allow_other_weights=allowed)
        published.check(channels=3, resolution=32)
        assert published.label == ""
    assert published.hash == other.hash


def test_inceptions_file_is_the_one_that_torch_fidelity_fetches():
    from torch_fidelity.feature_extractor_inceptionv3 import URL_INCEPTION_V3

    (wanted,) = InceptionExtractor().downloads()
    assert wanted.url == URL_INCEPTION_V3
    assert wanted.path.name == INCEPTION_FILE
    assert re.search(r"-([0-9a-f]{8})\.pth$", wanted.url)[1] == wanted.sha256


# --- VGG16 ---


def test_vgg16_is_torch_fidelitys(vgg_file, monkeypatch):
    from torch_fidelity import FeatureExtractorVGG16

    monkeypatch.setattr(extractors, "VGG16_SHA256", sha256(vgg_file)[:8])
    extractor = VGG16Extractor(weights=str(vgg_file))
    rgb, found = used(extractor)
    assert extractor.label == "vgg16"
    (expected,) = FeatureExtractorVGG16("vgg16", ["fc2_relu"], str(vgg_file))(rgb)
    assert found.features.shape == (3, 12)
    assert expected.std() > 0
    torch.testing.assert_close(found.features, expected, rtol=1e-4, atol=1e-6)
    assert found.logits is None


def test_vgg16s_file_is_torchvisions():
    from torchvision.models import VGG16_Weights

    assert VGG16_Weights.IMAGENET1K_V1.url == VGG16Extractor().url
    assert VGG16Extractor().sha256 in VGG16Extractor().url


@pytest.mark.slow
def test_the_whole_vgg16(tmp_path):
    import torchvision

    torch.save(torchvision.models.vgg16().state_dict(), tmp_path / "vgg.pth")
    extractor = VGG16Extractor(weights=str(tmp_path / "vgg.pth"), allow_other_weights=True)
    assert used(extractor)[1].features.shape == (3, 4096)
    assert extractor.label == f"vgg16_unpublished_{sha256(tmp_path / 'vgg.pth')[:8]}"


# --- CLIP ---


@pytest.mark.filterwarnings("ignore:.*torch.jit.load")
def test_clip_is_torch_fidelitys(clip_file, monkeypatch):
    from torch_fidelity import FeatureExtractorCLIP, feature_extractor_clip

    facts = {"hash": sha256(clip_file), "filename": "ViT-B-32"}
    monkeypatch.setitem(feature_extractor_clip.MODEL_METADATA, "clip-vit-b-32", facts)
    extractor = CLIPExtractor(weights=str(clip_file))
    rgb, found = used(extractor)
    assert extractor.label == "clip_vit_b_32"
    (expected,) = FeatureExtractorCLIP("clip-vit-b-32", ["clip"], str(clip_file))(rgb)
    assert found.features.shape == (3, 16)
    assert expected.std() > 0
    torch.testing.assert_close(found.features, expected, rtol=1e-4, atol=1e-5)


def test_a_clip_for_other_images_is_refused_and_one_of_other_weights_marked(clip_file):
    extractor = CLIPExtractor(weights=str(clip_file), allow_other_weights=True)
    extractor.check(channels=1, resolution=8)
    assert extractor.label == f"clip_vit_b_32_unpublished_{sha256(clip_file)[:8]}"
    larger = CLIPExtractor(model="clip-vit-l-14-336px", weights=str(clip_file), allow_other_weights=True)
    assert "336x336" in larger.resize
    with pytest.raises(ValueError, match="takes images of 224, not 336"):
        larger.check(channels=3, resolution=32)


def test_clips_files_are_where_torch_fidelity_looks_for_them():
    from torch_fidelity.feature_extractor_clip import MODEL_METADATA

    for model, facts in MODEL_METADATA.items():
        (wanted,) = CLIPExtractor(model=model).downloads()
        assert wanted.sha256 == facts["hash"]
        assert facts["hash"] in wanted.url
        assert wanted.path.name == f"{model}-{facts['hash']}.pt"


# --- DINOv2 ---


def test_dinov2_runs_checked_code_through_torch_fidelity(dinov2_files):
    extractor = DINOv2Extractor(**dinov2_files)
    _, found = used(extractor)
    assert extractor.label == "dinov2_vit_s_14"
    assert found.features.shape == (3, 6)
    state = torch.load(dinov2_files["weights"], weights_only=True)
    mean, std = torch.tensor([0.485, 0.456, 0.406]), torch.tensor([0.229, 0.224, 0.225])
    flat = torch.full((1, 3, 8, 8), 100, dtype=torch.uint8)  # resizing leaves it alone
    x = ((100 / 255 - mean) / std).view(1, 3, 1, 1).expand(1, 3, 14, 14)
    expected = torch.nn.functional.conv2d(x, state["patch.weight"], state["patch.bias"]).flatten(1)
    torch.testing.assert_close(extractor(flat).features, expected, rtol=1e-4, atol=1e-4)


def test_dinov2s_code_must_be_there_and_unchanged(dinov2_files, tmp_path):
    with pytest.raises(ValueError, match=r"^code=.*nowhere: holds no hubconf.py.*github.com/facebookresearch") as error:
        DINOv2Extractor(weights=dinov2_files["weights"], code=str(tmp_path / "nowhere")).check(channels=3, resolution=8)
    assert "\n" not in str(error.value)
    (tmp_path / "code" / "more.py").write_text("raise SystemExit")
    for allowed in (False, True):
        changed = DINOv2Extractor(**dinov2_files, allow_other_weights=allowed)
        with pytest.raises(ValueError, match=r"^code=.*must be commit .* unchanged"):
            changed.check(channels=3, resolution=8)
        with pytest.raises(ValueError, match="must be commit"):
            changed(images(1, 3))


def test_dinov2_runs_what_was_hashed_and_nothing_beside_it(dinov2_files, tmp_path):
    code = tmp_path / "code"
    harm = compile(f"open({str(tmp_path / 'harmed')!r}, 'w')\n{HUBCONF}", "hubconf.py", "exec")
    unchecked = importlib._bootstrap_external._code_to_hash_pyc(harm, bytes(8), False)  # Python runs it as it is
    (code / "__pycache__").mkdir()
    Path(importlib.util.cache_from_source(str(code / "hubconf.py"))).write_bytes(unchecked)
    (code / "torch.so").write_bytes(b"")
    extractor = DINOv2Extractor(**dinov2_files)
    extractor.check(channels=3, resolution=8)
    assert extractor(images(1, 3)).features.shape == (1, 6)
    assert not (tmp_path / "harmed").exists()
    later = DINOv2Extractor(**dinov2_files)
    later.check_files()
    (code / "hubconf.py").write_text("raise SystemExit")
    with pytest.raises(ValueError, match="must be commit"):
        later(images(1, 3))


def test_a_dinov2_without_a_known_hash_is_taken_knowingly_only(dinov2_files):
    with pytest.raises(ValueError, match="what is known nowhere"):
        DINOv2Extractor(model="dinov2-vit-g-14", **dinov2_files).check(channels=3, resolution=8)
    marked = DINOv2Extractor(model="dinov2-vit-g-14", **dinov2_files, allow_other_weights=True)
    assert re.fullmatch("dinov2_vit_g_14_unpublished_[0-9a-f]{8}", marked.label)


def test_another_dinov2_is_not_mistaken_for_the_checked_one(dinov2_files, tmp_path, monkeypatch):
    other = types.ModuleType("dinov2")
    other.__file__ = str(tmp_path / "elsewhere" / "__init__.py")
    monkeypatch.setitem(sys.modules, "dinov2", other)
    with pytest.raises(ValueError, match="another dinov2 is imported already, .*elsewhere"):
        DINOv2Extractor(**dinov2_files)(images(1, 3))


def test_dinov2_fetches_weights_and_code():
    weights, code = DINOv2Extractor(model="dinov2-vit-l-14").downloads()
    assert weights.url.endswith("/dinov2_vitl14/dinov2_vitl14_pretrain.pth")
    assert weights.path.name == "dinov2_vitl14_pretrain.pth"  # where torch.hub would put it
    assert code.url.endswith(f"{dinov2.DINOV2_COMMIT}.zip")
    assert len(weights.sha256) == 64
    assert code.sha256 is None


# --- digits ---


@pytest.mark.parametrize(
    ("bad", "message"),
    [
        ({"channels": 3}, "channels=3: "),
        ({"resolution": 32}, "resolution=32: "),
        ({"resolution": [8, 16]}, "resolution=[8, 16]: "),
    ],
)
def test_digits_refuse_other_images(bad, message):
    with pytest.raises(ValueError, match="^" + re.escape(message)):
        DigitsExtractor().check(**{"channels": 1, "resolution": 8} | bad)


def test_digits_with_other_weights_are_marked(tmp_path):
    DigitsExtractor().check(channels=1, resolution=[8, 8])
    assert DigitsExtractor().label == "digits"
    copy = tmp_path / "copy.safetensors"
    copy.write_bytes(DigitsExtractor.shipped.read_bytes())
    assert DigitsExtractor(weights=str(copy)).label == "digits"
    copy.write_bytes(copy.read_bytes()[:-1] + b"\x00")
    assert DigitsExtractor(weights=str(copy)).label == f"digits_unpublished_{sha256(copy)[:8]}"
    with pytest.raises(ValueError, match=r"weights=nowhere: no such file"):
        DigitsExtractor(weights="nowhere").check(channels=1, resolution=8)
