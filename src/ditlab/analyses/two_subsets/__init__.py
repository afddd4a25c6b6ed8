"""Two models trained on disjoint images, sampled from the same noise."""
