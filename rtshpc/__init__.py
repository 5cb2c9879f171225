"""rtshpc: GeoTIFFs of permafrost terrain to multimodal thaw-slump detectors, on SLURM clusters and laptops."""

__version__ = "0.1.0"
