"""Networks with their own input range, by architecture."""
