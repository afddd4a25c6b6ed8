"""Train and test PSNR along training."""
