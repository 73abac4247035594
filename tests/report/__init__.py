"""The report: what a reader sees is there, is right, is escaped, and needs nothing from outside the file."""
