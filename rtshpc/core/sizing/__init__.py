"""Memory, time and scaling of a training: what is asked, and what records hold of it."""
