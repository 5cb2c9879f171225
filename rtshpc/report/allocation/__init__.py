"""The report that asks for an allocation: what was measured, and what follows for the request."""
