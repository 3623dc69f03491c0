"""A run compiled for a TPU slice that is not there: what it holds, moves and may cost."""
