"""What fits and what is wasted, worked out before (or without) running a model."""
