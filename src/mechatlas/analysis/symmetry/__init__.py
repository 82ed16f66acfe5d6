"""Features under a finite group: what leaves them unchanged, and which are one another's poses."""
