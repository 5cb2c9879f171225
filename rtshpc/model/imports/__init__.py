"""Weights of other projects: files -> tensors under our names (Detectron2's), fitted to a detector, and back."""
