"""Composes the sections that the analyses give into one page; model cards for the hub."""
