"""Shards of chips, and samples out of them."""
