"""Records -> tables, figures and pages."""
