"""Studies: declared grids of runs and analyses, the local runner, and the page that shows what is known so far."""
