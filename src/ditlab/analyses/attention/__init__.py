"""Attention maps and how local they are."""
