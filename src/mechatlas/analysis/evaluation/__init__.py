"""Evaluation of a dictionary: its error, and its worth to the network that it is of."""
