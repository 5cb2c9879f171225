"""Rasters, grids, chips and instances on the ground. No torch."""
