from __future__ import annotations

import pytest
import torch
from torch import nn

from denoiselab.evaluation.extractors import DigitsExtractor
from denoiselab.evaluation.features import Features


def images(n=8, channels=1, size=8):
    generator = torch.Generator().manual_seed(0)
    return torch.randint(0, 256, (n, channels, size, size), dtype=torch.uint8, generator=generator)


def test_features_do_not_depend_on_the_batch_size():
    found = DigitsExtractor()(images(10))
    assert found.features.shape == (10, 64)
    assert found.logits.shape == (10, 10)
    assert found.features.dtype == found.logits.dtype == torch.float32
    assert found.spatial is None
    parts = DigitsExtractor()(images(10), batch_size=3)
    torch.testing.assert_close(parts.features, found.features, rtol=1e-5, atol=1e-5)


def test_features_are_float32_under_autocast():
    plain = DigitsExtractor()(images())
    with torch.autocast("cpu", torch.bfloat16):
        assert torch.equal(DigitsExtractor()(images()).features, plain.features)


def test_joined_keeps_the_order_and_what_there_is():
    batches = [Features(torch.full((n, 2), n), spatial=torch.full((n, 3), n)) for n in (2, 1)]
    joined = Features.joined(batches)
    assert joined.features[:, 0].tolist() == [2, 2, 1]
    assert joined.spatial[:, 2].tolist() == [2, 2, 1]
    assert joined.logits is None
    assert list(joined.tensors()) == ["features", "spatial"]


def test_an_extractor_is_light_and_leaves_the_global_generator_alone():
    extractor = DigitsExtractor(weights="nowhere.safetensors")  # nothing is read before the first use
    assert not isinstance(extractor, nn.Module)
    before = torch.get_rng_state()
    DigitsExtractor()(images())
    assert torch.equal(torch.get_rng_state(), before)


def test_an_extractor_is_in_no_state_dict_of_what_holds_it():
    class Holder(nn.Module):
        def __init__(self):
            super().__init__()
            self.extractor = DigitsExtractor()
            self.extractor(images())  # with its network

    holder = Holder()
    assert holder.state_dict() == {}
    assert list(holder.modules()) == [holder]
    assert list(holder.parameters()) == []


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


def test_what_is_no_batch_of_images_is_refused():
    for wrong in (images().float(), images()[0], images()[:0]):
        with pytest.raises(ValueError, match=r"images=.*must be uint8"):
            DigitsExtractor()(wrong)
