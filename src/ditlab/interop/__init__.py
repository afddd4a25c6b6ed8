"""Other people's weights, brought into ditlab's networks."""
