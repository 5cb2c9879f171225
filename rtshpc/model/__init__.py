"""The detector: backbones, pyramid, heads, weights."""
