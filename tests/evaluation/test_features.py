from __future__ import annotations

import os
import re

import pytest
import torch
from torch import nn

from denoiselab.evaluation import features as module
from denoiselab.evaluation.features import INCEPTION_FILE, DigitsExtractor, InceptionExtractor


def images(n=8, channels=1, size=8):
    generator = torch.Generator().manual_seed(0)
    return torch.randint(0, 256, (n, channels, size, size), dtype=torch.uint8, generator=generator)


def test_digits_features_do_not_depend_on_the_batch_size():
    found = DigitsExtractor()(images(10))
    assert found.features.shape == (10, 64)
    assert found.logits.shape == (10, 10)
    assert found.features.dtype == found.logits.dtype == torch.float32
    parts = DigitsExtractor()(images(10), batch_size=3)
    torch.testing.assert_close(parts.features, found.features, rtol=1e-5, atol=1e-5)


def test_digits_features_are_float32_under_autocast():
    plain = DigitsExtractor()(images())
    with torch.autocast("cpu", torch.bfloat16):
        assert torch.equal(DigitsExtractor()(images()).features, plain.features)


def test_an_extractor_is_light_and_leaves_the_global_generator_alone():
    extractor = DigitsExtractor(weights="nowhere.safetensors")  # nothing is read before the first use
    assert not isinstance(extractor, nn.Module)
    before = torch.get_rng_state()
    DigitsExtractor()(images())
    assert torch.equal(torch.get_rng_state(), before)


def test_to_moves_a_network_that_is_built_and_one_that_is_not():
    extractor = DigitsExtractor()
    assert extractor.to("cpu") is extractor
    extractor(images())
    extractor.to("meta")
    assert next(extractor._network.parameters()).device.type == "meta"


def test_hash_follows_the_weights_and_the_preprocessing(tmp_path):
    copy = tmp_path / "copy.safetensors"
    copy.write_bytes(DigitsExtractor().weights.read_bytes())
    assert DigitsExtractor(weights=str(copy)).hash == DigitsExtractor().hash
    copy.write_bytes(copy.read_bytes()[:-1] + b"\x00")
    assert DigitsExtractor(weights=str(copy)).hash != DigitsExtractor().hash
    other = DigitsExtractor()
    other.resize = "another"
    assert other.hash != DigitsExtractor().hash


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


def test_missing_files_and_wrong_tensors_are_one_line():
    DigitsExtractor().check(channels=1, resolution=[8, 8])
    with pytest.raises(ValueError, match=r"weights=nowhere: no such file"):
        DigitsExtractor(weights="nowhere").check(channels=1, resolution=8)
    for wrong in (images().float(), images()[0], images()[:0]):
        with pytest.raises(ValueError, match=r"images=.*must be uint8"):
            DigitsExtractor()(wrong)


def test_missing_inception_says_what_to_fetch_and_where_to_put_it(tmp_path, monkeypatch):
    monkeypatch.setenv("TORCH_HOME", str(tmp_path))
    with pytest.raises(ValueError, match="weights=") as error:
        InceptionExtractor().check(channels=3, resolution=32)
    message = str(error.value)
    assert "\n" not in message
    assert os.path.join(str(tmp_path), "hub", "checkpoints", INCEPTION_FILE) in message
    from torch_fidelity.feature_extractor_inceptionv3 import URL_INCEPTION_V3

    assert URL_INCEPTION_V3 in message


def test_other_inception_weights_are_refused_or_marked(inception_file, monkeypatch):
    with pytest.raises(ValueError, match=r"SHA-256 must begin with 6726825d") as error:
        InceptionExtractor(weights=str(inception_file)).check(channels=3, resolution=32)
    assert "\n" not in str(error.value)
    with pytest.raises(ValueError, match="SHA-256"):  # nor without the check
        InceptionExtractor(weights=str(inception_file))(images(1, 3))
    other = InceptionExtractor(weights=str(inception_file), allow_other_weights=True)
    other.check(channels=1, resolution=[16, 32])
    assert other.prefix == "fd_inception_other"
    with pytest.raises(ValueError, match="channels=4: "):
        other.check(channels=4, resolution=32)
    monkeypatch.setattr(module, "INCEPTION_SHA256", other.weights_sha256[:8])
    published = InceptionExtractor(weights=str(inception_file), allow_other_weights=True)
    published.check(channels=3, resolution=32)
    assert published.prefix == "fid"


def test_a_file_that_runs_code_is_refused(tmp_path):
    torch.save({"x": os.system}, tmp_path / "evil.pth")
    (tmp_path / "broken.pth").write_bytes(b"x")
    for name in ("evil.pth", "broken.pth"):
        with pytest.raises(ValueError, match="state dict of plain tensors"):
            InceptionExtractor(weights=str(tmp_path / name), allow_other_weights=True).check(channels=3, resolution=32)


def test_inception_features_are_those_of_torch_fidelity_and_grey_counts_as_rgb(inception_file):
    from torch_fidelity import FeatureExtractorInceptionV3

    extractor = InceptionExtractor(weights=str(inception_file), allow_other_weights=True)
    grey = images(3)
    found = extractor(grey, batch_size=2)
    assert found.features.shape == (3, 2048)
    assert found.logits is None
    oracle = FeatureExtractorInceptionV3("inception-v3-compat", ["2048"], str(inception_file))
    (expected,) = oracle(grey.repeat(1, 3, 1, 1))
    assert expected.std() > 0
    torch.testing.assert_close(found.features, expected, rtol=1e-4, atol=1e-6)
