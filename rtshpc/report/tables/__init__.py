"""The report's tables, each from records alone."""
