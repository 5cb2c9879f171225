"""Tools without a cell, a verb a module: they print, and write no record."""
