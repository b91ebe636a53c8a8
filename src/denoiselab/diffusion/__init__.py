"""The mathematics of Gaussian diffusion: paths, predictions, denoisers, objectives, samplers. torch only."""
