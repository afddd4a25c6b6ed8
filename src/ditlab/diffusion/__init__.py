"""Diffusion: noise schedules, objectives, the denoiser contract and its implementations, samplers, the bound."""
