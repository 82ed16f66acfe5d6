"""Which branch of a site computes a feature."""
