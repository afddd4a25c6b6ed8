"""Drawing results: figures and the report page. Nothing is computed here (DESIGN 3)."""
