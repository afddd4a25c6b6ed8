"""The toolkit of pages: themed figures, grids, token picker, templates."""
