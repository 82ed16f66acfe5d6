"""Circuits: features of a site, computed from those of an earlier site, by branch."""
