"""Maps beside each other: of one ground in several years, and beside reference polygons."""
