"""The command line: flags, one call of `ditlab.*`, a table."""
