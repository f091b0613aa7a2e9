"""Sheets of pictures and drawings of scene graphs. Pixels only, no models."""
