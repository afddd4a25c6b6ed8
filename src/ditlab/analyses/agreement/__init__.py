"""Agreement of a model's samples with those of closed-form denoisers."""
