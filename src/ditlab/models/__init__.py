"""From a source string to a model: a denoiser with its images, split and results folder."""
