"""What works on this machine and at a site, and what to do about what does not."""
