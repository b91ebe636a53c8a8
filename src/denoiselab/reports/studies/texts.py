"""What the pages of the studies say beside their numbers; every number in it is filled in."""

from __future__ import annotations

FREQUENCY = """\
**Power** is what a sampler draws in a band over what it should draw, in decibels: negative where it blurs, positive
where it rings. **Distance** is how far its Fourier coefficients are from the right ones, relative to these: errors that
cancel in the power do not cancel here, so whether the error *shrinks* is judged by the distance, and whether it *blurs*
by the power. Bands are octaves of spatial frequency, in cycles per image. Every sampler has the grid of its YAML.

- **exact**: a stationary Gaussian field of {side}×{side} pixels with a spectrum ∝ |k|^−{slope:g}. Its best denoiser
  is a Wiener filter, so a sampler is a linear filter of its noise, and both quantities are computed and not estimated.
  The distance of a sampler with noise of its own is that of the two laws.
- **run, against its ODE**: {images} samples against the solution of the network's ODE from the same noise: the error of
  discretisation alone. Samplers with noise of their own solve no ODE and are left out.
- **run, against test images**: the power of the same samples, as images, over that of the test split: the network's own
  error is in it, too, and the ODE's solution marks how much of it is the network's."""
FREQUENCY_POWER = """\
Power in each octave of spatial frequency over what it should be, against the number of steps: above zero a sampler
rings, below it blurs. The scale is linear between −0.1 and 0.1 dB and logarithmic beyond. Bars are intervals of 95 %
over images; the exact field needs none. Dashed: the solution of the network's ODE."""
FREQUENCY_DISTANCE = """\
Distance of the Fourier coefficients from the right ones, relative to these, against the number of steps."""

GUIDANCE = """\
Classifier-free guidance (Ho & Salimans 2022) at scale 1 (none) and at {scales}, at all noise levels or only where σ/α
is between {low:g} and {high:g} (Kynkäänniemi et al. 2024). All settings take the same noise, labels and steps, so
that their differences are paired; guidance costs more evaluations.

- **accuracy**: the share of samples that are classified as asked; **class diversity**: the root-mean-square distance of
  two samples of one class, averaged over the classes; **recall**: the share of real images that are nearer to a
  sample than that sample's third neighbour (Kynkäänniemi et al. 2019).
- **exact density**: {points} points of three classes in the plane, each a mixture of four Gaussians; the conditional
  and the unconditional denoiser and the classifier are the best ones, in closed form. Recall is of as many real
  points.
- **run**: {images} samples in the features of a classifier of the data; recall is of the training images.
- **real**: fresh points of the density, or the run's test images, with their true classes."""
GUIDANCE_CAPTION = """\
Share classified as asked, diversity within a class and recall against the guidance scale, guided everywhere or where
σ/α is between {low:g} and {high:g}, with intervals of 95 % (Wilson's for the share, a block jackknife's for the
others, which is cautious for recall). Dashed: real images."""

COPYING = """\
An image is a copy if its distance to the nearest of some images is less than a third of that to the second nearest
(Yoon et al. 2023). A run is trained for each size of the training set, with equal steps ({steps}) and otherwise equal
settings, and {images} samples of its average are compared, as 8-bit images, in pixels and in the features of a
classifier:

- **samples, training images**: the copy rate;
- **samples, images held out**: the same samples against as many real images that the run has not seen (where there
  are not as many, against those there are);
- **real images, training images**: test images, which can be no copies, against the same training images;
- **ideal denoiser of the training set**: what the best denoiser of exactly these images makes of noise, in closed
  form.

The exact density is a mixture of {parts} Gaussians in {dimensions} dimensions, of which the training points are
drawn; fresh draws are the control."""
COPYING_CAPTION = """\
Share of copies against the size of the training set, with Wilson's intervals of 95 %. Left and middle: runs trained
for this study; right: an exact density. Below: samples of each run over the training images nearest to them in
pixels."""
