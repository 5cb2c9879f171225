"""Memory and time of a training step: measured, and predicted."""
