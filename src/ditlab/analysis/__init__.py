"""What can be measured on a denoiser: `(denoiser, images, settings) -> result`, a frozen dataclass (DESIGN 2)."""
