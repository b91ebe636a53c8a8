"""How a network is trained: a path, a prediction, and where, with which noise and how hard the loss is asked.

t ~ time_sampling,  ε ~ coupling(x0),  x_t = α·x0 + σ·ε,  loss = w(t)·mean‖network(x_t, t) − (a·x0 + b·ε)‖²
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
from denoiselab.diffusion.prediction import Prediction, check_legal
from denoiselab.diffusion.time_sampling import TimeSampling
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

    Raises:
        ValueError: if the prediction cannot be read somewhere on the path, or label_dropout is out of range.
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
    ) -> None:
        super().__init__()
        check_legal(path, prediction)
        if not 0 <= label_dropout < 1:
            raise ValueError(f"label_dropout={label_dropout}: must be in [0, 1)")
        self.path, self.prediction = path, prediction
        self.time_sampling, self.weighting, self.coupling = time_sampling, weighting, coupling
        self.label_dropout = label_dropout

    def forward(self, network: Network, x0: Images, condition: Condition, noise: NoiseSource) -> Losses:
        """The losses of a batch; `noise` decides t, ε and which labels are hidden."""
        t = self.time_sampling(self.path, noise)
        eps = self.coupling(x0, noise)
        condition = condition.drop(noise.uniform("label_dropout") < self.label_dropout)
        pair = self.prediction.pair(self.path, t)
        x_t = per_sample(pair.alpha, x0) * x0 + per_sample(pair.sigma, x0) * eps
        target = per_sample(pair.a, x0) * x0 + per_sample(pair.b, x0) * eps
        error = ask(network, self.path, self.prediction, x_t, t, condition) - target
        weight = self.weighting(self.path, self.prediction, t).to(error.dtype)
        return Losses(weight * error.square().flatten(1).mean(1), t)

    def denoiser(self, network: Network) -> NetworkDenoiser:
        """What this objective makes of a network."""
        return NetworkDenoiser(network=network, path=self.path, prediction=self.prediction)
