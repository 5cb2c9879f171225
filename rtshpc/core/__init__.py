"""Configs, cells, paths and records. Standard library and pydantic only: imported on login nodes."""
