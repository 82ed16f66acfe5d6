"""Which feature of one site is computed from which of the site before, and by which branch."""
