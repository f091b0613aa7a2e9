"""Modules with parameters."""
