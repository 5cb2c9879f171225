"""Detections of many chips become one set of instances, their outlines, attributes and layers. No torch."""
