"""Matching of the latents of two or more dictionaries: folding, pairing, chains, evidence."""
