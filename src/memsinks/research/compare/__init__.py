"""Arms x seeds of rivals: one table."""
