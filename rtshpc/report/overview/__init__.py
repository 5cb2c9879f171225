"""The page of a map run: overview maps, counts, scores."""
