"""Map runs: which scenes, where they lie, and the cells that map them."""
