"""Region proposals, boxes and masks on a pyramid."""
