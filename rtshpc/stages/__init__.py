"""The pipeline, a verb a module: shards, training, scores, memory, report."""
