"""Mamba, the model: configuration, modeling, state cache, checkpoints and the ops they are built from."""
