"""From detections on chips to one clean set of slumps: no chip, block or task leaves a trace in it."""
