"""Training, scoring and measuring of detectors."""
