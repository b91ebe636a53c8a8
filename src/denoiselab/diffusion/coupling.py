"""Which noise goes with which image."""

from __future__ import annotations

from abc import ABC, abstractmethod

import torch

from denoiselab.condition import Condition
from denoiselab.diffusion.denoiser import Images
from denoiselab.diffusion.noise import NoiseSource


class Coupling(ABC):
    """A joint distribution of (x0, ε) whose ε is standard normal."""

    group_size = 1  # how many consecutive places of the global batch are coupled with one another

    @abstractmethod
    def __call__(self, x0: Images, noise: NoiseSource, condition: Condition) -> Images:
        """The noise for each image of the batch."""

    def check(self, micro_batch: int) -> None:
        """See to it that a micro-batch of so many samples holds whole groups.

        Raises:
            ValueError: if it does not.
        """
        if micro_batch % self.group_size:
            raise ValueError(f"group_size={self.group_size}: must divide the micro-batch of {micro_batch} samples")


class Independent(Coupling):
    """ε drawn without looking at x0."""

    def __call__(self, x0: Images, noise: NoiseSource, condition: Condition) -> Images:
        """Standard normal."""
        return noise.normal("epsilon", x0.shape[1:], x0.dtype)


class MinibatchOT(Coupling):
    """Independent noise, handed out among the images of a group so that the sum of squared distances is least.

    The empirical measures have equal weights, so an optimal plan is a permutation. Groups are consecutive places of the
    *global* batch: the plan depends neither on ranks nor on accumulation as long as a micro-batch holds whole groups. Images
    with labels only trade noise within their class: across classes the noise of a class would no longer be standard normal,
    which is what sampling with a label starts from (Cheng & Schwing 2025).

    Args:
        group_size: images per group, at least 1; must divide the micro-batch.

    Source: Pooladian et al. 2023 (BatchOT); Tong et al. 2024 (OT-CFM).
    """

    def __init__(self, *, group_size: int) -> None:
        if group_size < 1:
            raise ValueError(f"group_size={group_size}: must be at least 1")
        self.group_size = group_size

    def __call__(self, x0: Images, noise: NoiseSource, condition: Condition) -> Images:
        """Standard normal, permuted within each class of each group.

        Raises:
            ValueError: if the batch is not made of whole groups of consecutive places.
        """
        from scipy.optimize import linear_sum_assignment

        self.check(len(x0))
        places = noise.index.reshape(-1, self.group_size)
        if (places[:, 0] % self.group_size).any() or (places.diff(dim=1) != 1).any():
            raise ValueError(f"group_size={self.group_size}: a batch must hold whole groups of consecutive places")
        eps = noise.normal("epsilon", x0.shape[1:], x0.dtype)
        label = torch.zeros(len(x0)) if condition.label is None else condition.label.cpu()
        plan = torch.arange(len(x0))
        # Group by group in float64: a plan must not hang on how a product of another batch shape is rounded.
        for group in torch.arange(len(x0)).split(self.group_size):
            for kind in label[group].unique():
                rows = group[label[group] == kind]
                # Σ‖x − ε‖² differs from −2·Σ x·ε by what no permutation changes.
                inner = x0[rows].flatten(1).double() @ eps[rows].flatten(1).double().T
                plan[rows] = rows[torch.as_tensor(linear_sum_assignment(inner.cpu().numpy(), maximize=True)[1])]
        return eps[plan.to(eps.device)]
