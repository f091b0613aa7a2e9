"""Noise, losses and sampling for any denoiser."""
