"""Inputs and fixtures of one subject each."""
