"""Training: stages, engines, optimisers, checkpoints, logs."""
