"""Samples beside their nearest training images."""
