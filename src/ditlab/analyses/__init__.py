"""Analyses: one folder for each question asked of models."""
