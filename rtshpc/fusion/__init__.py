"""Scales of several modalities -> one set of scales (Li et al. 2025)."""
