"""A density with classes whose conditional and unconditional best denoisers, and whose best classifier, are known."""

from __future__ import annotations

import math
from collections.abc import Sequence

import torch
from torch import Tensor

from denoiselab.condition import NULL_LABEL, Condition
from denoiselab.diffusion.denoiser import Images, Posterior, per_sample
from denoiselab.diffusion.exact import Mixture
from denoiselab.diffusion.noise import NoiseSource
from denoiselab.diffusion.paths import Path, Time


class Classes:
    """Equally frequent classes, each a mixture of Gaussians.

    Args:
        mixtures: one for each class, all of D coordinates.
    """

    def __init__(self, mixtures: Sequence[Mixture]) -> None:
        self.mixtures = list(mixtures)
        joined = [torch.cat([getattr(m, name) for m in mixtures]) for name in ("weights", "means", "stds")]
        weights, means, stds = (part.tolist() for part in (joined[0] / len(mixtures), *joined[1:]))
        self.everything = Mixture(weights, means, stds)

    def of(self, label: int) -> Mixture:
        """The density of a class; of all for no label."""
        return self.everything if label == NULL_LABEL else self.mixtures[label]

    def sample(self, labels: Tensor, seed: int) -> Tensor:
        """Points (N, D) of classes, int64 of shape (N,)."""
        noise = NoiseSource(seed=seed, index=torch.arange(len(labels)))
        normal, uniform = noise.normal("real", self.everything.mean.shape, torch.float64), noise.uniform("real part")
        return _by_label(labels, lambda label, rows: self.of(label).sample(normal[rows], uniform[rows]))

    def log_posterior(self, points: Tensor) -> Tensor:
        """The log-probability of each class at points (N, D), (N, K): the logits of the best classifier."""
        return torch.stack([m.log_prob(points) for m in self.mixtures], dim=1).log_softmax(1)

    def denoiser(self, path: Path) -> ClassDenoiser:
        """The best denoiser on a path."""
        return ClassDenoiser(path, self)


class ClassDenoiser:
    """The best denoiser of a density with classes, given the label or none, in float64.

    Args:
        path: any.
        classes: the data.
    """

    consistent = True

    def __init__(self, path: Path, classes: Classes) -> None:
        self.path, self.classes = path, classes

    def __call__(self, x: Images, t: Time, condition: Condition) -> Posterior:
        """E[x0 | x_t, label] and the ε that goes with it."""
        assert condition.label is not None
        alpha, sigma = (c.expand(len(x)) for c in (self.path.alpha(t), self.path.sigma(t)))
        flat = x.flatten(1).double()
        x0 = _by_label(
            condition.label, lambda label, rows: self.classes.of(label).x0(flat[rows], alpha[rows], sigma[rows])
        ).reshape(x.shape)
        return Posterior(x0, (x - per_sample(alpha, x) * x0) / per_sample(sigma, x))

    def evaluations(self, t: float) -> int:
        """One."""
        return 1

    def fresh(self) -> ClassDenoiser:
        """Itself."""
        return self


def _by_label(labels: Tensor, part: object) -> Tensor:
    rows = {label: labels == label for label in labels.unique().tolist()}
    found = {label: part(label, chosen) for label, chosen in rows.items()}  # type: ignore[operator]
    whole = torch.empty(len(labels), *next(iter(found.values())).shape[1:], dtype=torch.float64)
    for label, chosen in rows.items():
        whole[chosen] = found[label]
    return whole


def three_arcs() -> Classes:
    """Three classes in the plane, each four Gaussians along an arc; the arcs run side by side and touch.

    The best classifier is right of nine points in ten: there is adherence to be won, and diversity to be lost.
    """
    mixtures = []
    for k in range(3):
        angles = [2 * math.pi * k / 3 + 0.6 * j for j in range(4)]
        means = [[(1 + 0.1 * j) * math.cos(a), (1 + 0.1 * j) * math.sin(a)] for j, a in enumerate(angles)]
        mixtures.append(Mixture([0.4, 0.3, 0.2, 0.1], means, [0.4] * 4))
    return Classes(mixtures)
