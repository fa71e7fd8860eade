"""Checkpoints: where they come from, how they are read tensor by tensor, and how they become a frozen model."""
