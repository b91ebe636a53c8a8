"""Train the digits classifier of `denoiselab.evaluation` on the train split and write its weights."""

from __future__ import annotations

import hashlib
import sys

import torch
import torch.nn.functional as F
from torch import Tensor

from denoiselab.data.digits import load_digits_split
from denoiselab.evaluation.digits_classifier import WEIGHTS, DigitsClassifier, save_classifier

STEPS, BATCH, PEAK_RATE = 1500, 128, 3e-3


def shifted(images: Tensor, generator: torch.Generator) -> Tensor:
    """Each image moved by -1, 0 or 1 pixels along each axis, the border filled with zeros."""
    rows, columns = torch.randint(0, 3, (2, len(images), 1, 1), generator=generator)
    padded = F.pad(images[:, 0], (1, 1, 1, 1))  # (B, 10, 10)
    sample = torch.arange(len(images)).view(-1, 1, 1)
    return padded[sample, rows + torch.arange(8).view(1, 8, 1), columns + torch.arange(8)].unsqueeze(1)


def train(images: Tensor, labels: Tensor) -> DigitsClassifier:
    generator = torch.Generator().manual_seed(0)
    network = DigitsClassifier()
    optimizer = torch.optim.AdamW(network.parameters(), lr=PEAK_RATE, weight_decay=1e-2)
    schedule = torch.optim.lr_scheduler.OneCycleLR(optimizer, PEAK_RATE, total_steps=STEPS)
    for _ in range(STEPS):
        chosen = torch.randint(0, len(images), (BATCH,), generator=generator)
        loss = F.cross_entropy(network(shifted(images[chosen], generator))[1], labels[chosen])
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
        schedule.step()
    return network.eval().requires_grad_(False)


def main(path: str) -> None:
    torch.set_num_threads(1)
    torch.manual_seed(0)
    images, labels = load_digits_split("train")
    test_images, test_labels = load_digits_split("test")
    network = train(images, labels)
    variance = network(images)[0].double().var(dim=0).mean()
    network.feature_scale.fill_(variance.rsqrt())
    accuracy = (network(test_images)[1].argmax(dim=1) == test_labels).double().mean().item()
    metadata = {
        "feature_scale": network.feature_scale.item(),
        "test_accuracy": accuracy,
        "train_sha256": hashlib.sha256(images.numpy().tobytes() + labels.numpy().tobytes()).hexdigest(),
    }
    save_classifier(network, metadata, path)
    with open(path, "rb") as file:
        print(f"test accuracy {accuracy:.4f}, sha256 {hashlib.file_digest(file, 'sha256').hexdigest()}, {path}")


if __name__ == "__main__":
    main(sys.argv[1] if len(sys.argv) > 1 else str(WEIGHTS))
