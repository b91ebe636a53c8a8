"""How a network is trained: a path, a prediction, and where, with which noise and how hard the loss is asked.

t ~ time_sampling,  ε ~ coupling(x0),  x_t = α·x0 + σ·ε,  loss = w(t)·mean‖network(x_t, t) − (a·x0 + b·ε)‖²

With a learned variance the network outputs twice the channels, and a term of the variational bound trains the second half:
L_hybrid = L_simple + λ·L_vlb (Nichol & Dhariwal 2021, eq. 16).
"""

from __future__ import annotations

from typing import NamedTuple

from jaxtyping import Float
from torch import Tensor, nn

from denoiselab.condition import Condition
from denoiselab.diffusion.coupling import Coupling
from denoiselab.diffusion.denoiser import Images, Network, NetworkDenoiser, ask, per_sample
from denoiselab.diffusion.noise import NoiseSource
from denoiselab.diffusion.paths import Path, Time
from denoiselab.diffusion.prediction import Pair, Prediction, check_legal
from denoiselab.diffusion.time_sampling import TimeSampling
from denoiselab.diffusion.variance import variational_bound
from denoiselab.diffusion.weighting import Weighting


class Losses(NamedTuple):
    """The loss of each sample of a batch, and the time at which it was asked."""

    loss: Float[Tensor, " B"]
    t: Time


class Objective(nn.Module):
    """A training objective; a module, so that parts with learned weights or history are saved with the network.

    Args:
        path: the Gaussian path.
        prediction: what the network outputs.
        time_sampling: the distribution of t.
        weighting: the loss weight.
        coupling: which noise goes with which image.
        label_dropout: share of training samples whose label is hidden, in [0, 1); classifier-free guidance needs some.
        learned_variance: whether the network has a second half of channels, in [−1, 1], for the variance of ancestral steps.
        vlb_weight: λ, the weight of the variational bound that trains it, at least 0.
        vlb_steps: T, the steps of the chain whose bound it is, at least 2.

    Raises:
        ValueError: if the prediction cannot be read somewhere on the path, or a number is out of range.
    """

    def __init__(
        self,
        *,
        path: Path,
        prediction: Prediction,
        time_sampling: TimeSampling,
        weighting: Weighting,
        coupling: Coupling,
        label_dropout: float = 0.0,
        learned_variance: bool = False,
        vlb_weight: float = 0.001,
        vlb_steps: int = 1000,
    ) -> None:
        super().__init__()
        check_legal(path, prediction)
        if not 0 <= label_dropout < 1:
            raise ValueError(f"label_dropout={label_dropout}: must be in [0, 1)")
        if not vlb_weight >= 0:
            raise ValueError(f"vlb_weight={vlb_weight}: must be at least 0")
        if vlb_steps < 2:
            raise ValueError(f"vlb_steps={vlb_steps}: must be at least 2")
        self.path, self.prediction = path, prediction
        self.time_sampling, self.weighting, self.coupling = time_sampling, weighting, coupling
        self.label_dropout = label_dropout
        self.learned_variance, self.vlb_weight, self.vlb_steps = learned_variance, vlb_weight, vlb_steps

    def forward(self, network: Network, x0: Images, condition: Condition, noise: NoiseSource) -> Losses:
        """The losses of a batch; `noise` decides t, ε and which labels are hidden."""
        t = self.time_sampling(self.path, noise)
        eps = self.coupling(x0, noise, condition)
        condition = condition.drop(noise.uniform("label_dropout") < self.label_dropout)
        c = self.path.coefficients(t)
        pair = Pair(c.alpha, c.sigma, *self.prediction.ab(c))
        x_t = per_sample(pair.alpha, x0) * x0 + per_sample(pair.sigma, x0) * eps
        target = per_sample(pair.a, x0) * x0 + per_sample(pair.b, x0) * eps
        output = ask(network, x_t, self.prediction.c_in(c), self.prediction.c_noise(self.path, t), condition)
        if self.learned_variance:
            output, variance = output.chunk(2, dim=1)
        error = output - target
        loss = self.weighting.loss(error.square().flatten(1).mean(1), self.path, self.prediction, t)
        if self.learned_variance:
            # The bound trains the variance alone: its gradient stops at the mean.
            guess = x0 - per_sample(pair.sigma / pair.det, x0) * error.detach()
            bound = variational_bound(self.path, t, x0, guess, (variance + 1) / 2, self.vlb_steps)
            loss = loss + self.vlb_weight * self.vlb_steps * bound
        return Losses(self.time_sampling.weight(self.path, t).to(loss.dtype) * loss, t)

    @property
    def observes(self) -> bool:
        """Whether `observe` wants to be told the losses."""
        return self.time_sampling.observes

    def observe(self, t: Time, loss: Float[Tensor, " N"]) -> None:
        """Learn from the losses of a whole global batch, in order of place (NaN if the step did not count); once per step."""
        self.time_sampling.observe(self.path, t, loss)

    def denoiser(self, network: Network) -> NetworkDenoiser:
        """What this objective makes of a network."""
        return NetworkDenoiser(
            network=network, path=self.path, prediction=self.prediction, learned_variance=self.learned_variance
        )
