"""Numbers of arrays and denoisers."""
