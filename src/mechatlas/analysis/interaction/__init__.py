"""Interaction basis: directions of activations and weights that matter, and their interactions."""
