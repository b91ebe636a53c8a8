"""Studies: predictions that introductory texts on diffusion make, measured on a trained run and on exact densities."""
