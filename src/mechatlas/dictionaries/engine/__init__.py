"""See the modules; nothing is re-exported here."""
