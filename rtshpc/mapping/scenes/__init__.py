"""Scenes to map: what their headers say, which belong together, and their pixels strip by strip."""
