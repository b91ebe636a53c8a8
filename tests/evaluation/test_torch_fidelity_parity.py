"""Our numbers are torch-fidelity's, from the same folders of PNG files and the same weights."""

from __future__ import annotations

import pytest
import torch
import torch_fidelity

from denoiselab.evaluation.distances import statistics
from denoiselab.evaluation.extractors import DigitsExtractor, InceptionExtractor
from denoiselab.evaluation.features import FeatureSet
from denoiselab.evaluation.measures import Frechet, InceptionScore, Kernel, PrecisionRecall
from denoiselab.evaluation.pictures import read_images
from denoiselab.evaluation.reference import Reference
from denoiselab.evaluation.writing import write_pngs

COUNT, SEED = 20, 2020
CONTRASTS = 60, 75


def pictures(seed, contrast):
    """Colour images, smooth and with some noise, uint8 of shape (COUNT, 3, 32, 32)."""
    generator = torch.Generator().manual_seed(seed)
    coarse = torch.randn(COUNT, 3, 4, 4, generator=generator)
    smooth = torch.nn.functional.interpolate(coarse, size=(32, 32), mode="bicubic")
    noise = 0.2 * torch.randn(COUNT, 3, 32, 32, generator=generator)
    return (127.5 + contrast * (smooth + noise)).clamp(0, 255).to(torch.uint8)


def save(folder, images):
    def source(numbers):
        yield torch.as_tensor(numbers), images[torch.as_tensor(numbers)]

    write_pngs(folder, source, range(len(images)), None, lambda count: None)
    return folder


@pytest.fixture(scope="module")
def folders(tmp_path_factory):
    folder = tmp_path_factory.mktemp("pictures")
    return [save(folder / str(i), pictures(i, contrast)) for i, contrast in enumerate(CONTRASTS)]


@pytest.fixture(scope="module")
def lively_inception_file(inception_file, tmp_path_factory):
    """Random weights under which images differ: plain ones shrink from layer to layer, to features all equal to 1e-9."""
    network = InceptionExtractor(weights=str(inception_file), allow_other_weights=True)._network
    norms = [module for module in network.modules() if isinstance(module, torch.nn.BatchNorm2d)]
    for norm in norms:
        norm.momentum = None  # the statistics of the batch that follows
        norm.train()
    with torch.no_grad():
        network(torch.cat([pictures(seed, 65)[:4] for seed in (5, 6)]))
    state = {key.removeprefix("network."): value for key, value in network.state_dict().items()}
    state["fc.weight"] = 20 * state["fc.weight"]  # so that it is sure of some classes
    path = tmp_path_factory.mktemp("lively") / "random.pth"
    torch.save(state, path)
    return path


def test_inception_measures_are_those_of_torch_fidelity(folders, lively_inception_file):
    theirs = torch_fidelity.calculate_metrics(
        input1=str(folders[0]),
        input2=str(folders[1]),
        feature_extractor="inception-v3-compat",
        feature_extractor_weights_path=str(lively_inception_file),
        isc=True,
        fid=True,
        kid=True,
        prc=True,
        isc_splits=2,
        kid_subsets=5,
        kid_subset_size=12,
        rng_seed=SEED,
        batch_size=7,
        cuda=False,
        cache=False,
        save_cpu_ram=True,
        verbose=False,
    )
    extractor, sets = InceptionExtractor(weights=str(lively_inception_file), allow_other_weights=True), []
    for folder in folders:
        images, labels = read_images(folder, 3)
        found = extractor(images, 10)
        sets.append(FeatureSet(found.features, labels, found.logits))
    samples, real = sets
    assert real.features.std(dim=0).mean() > 0.01  # or all of this would say nothing
    reference = Reference(statistics(real.features), None, real, torch.arange(COUNT), {})
    measures = [
        Frechet(),
        Kernel(subsets=5, subset_size=12, seed=SEED),
        InceptionScore(splits=2, seed=SEED),
        PrecisionRecall(),
    ]
    ours = {name: value.value for m in measures for name, value in m(samples, reference, "").items()}
    expected = {
        "fid": theirs["frechet_inception_distance"],
        "kid": theirs["kernel_inception_distance_mean"],
        "is": theirs["inception_score_mean"],
        "precision": theirs["precision"],
        "recall": theirs["recall"],
    }
    assert ours == pytest.approx(expected, rel=1e-4)
    assert expected["fid"] > 1
    assert expected["kid"] > 1e-3
    assert expected["is"] > 1.1


def test_pictures_come_back_from_files_as_they_were(folders):
    for i, contrast in enumerate(CONTRASTS):
        assert torch.equal(read_images(folders[i], 3)[0], pictures(i, contrast))


def test_a_distance_from_tensors_is_the_distance_from_saved_pictures(digits, tmp_path):
    samples, real = digits.test_set().images[:100], digits.train_set()
    extractor = DigitsExtractor()
    reference = Reference(statistics(extractor(real.images).features), None, None, torch.zeros(0), {})

    def distance(images):
        return Frechet()(FeatureSet(extractor(images).features, torch.full((100,), -1)), reference, "digits")

    reloaded, _ = read_images(save(tmp_path / "pictures", samples), 1)
    assert distance(reloaded) == distance(samples)
    assert distance(samples)["fd_digits"].value > 0.1
