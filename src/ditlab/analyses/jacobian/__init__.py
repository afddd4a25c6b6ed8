"""The Jacobian of a denoiser at an image."""
