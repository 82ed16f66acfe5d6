"""Effect of a dictionary's latents on the outputs of its network."""
