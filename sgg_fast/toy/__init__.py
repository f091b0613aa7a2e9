"""The embedded toy world: cartoon scenes with exact graphs, boxes and masks."""
