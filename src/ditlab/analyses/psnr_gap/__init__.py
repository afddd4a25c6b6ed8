"""The PSNR gap: how much better a denoiser is on its training images than on held-out ones."""
