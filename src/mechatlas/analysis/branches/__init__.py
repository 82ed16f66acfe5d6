"""Test which branch of a layer a feature belongs to, against chance."""
