"""What is measured, against parameters and compute."""
