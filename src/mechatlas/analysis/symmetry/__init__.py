"""Symmetries of features under a finite group: stabilizers, families of poses, their tests."""
