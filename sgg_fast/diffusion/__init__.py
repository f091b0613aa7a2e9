"""The mathematics given any denoiser: noise, losses, sampling."""
