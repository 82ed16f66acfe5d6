"""Statistics and examples of the latents of a dictionary on data."""
