"""Other people's models: read as denoisers, converted into ditlab's networks, and written in their formats."""
