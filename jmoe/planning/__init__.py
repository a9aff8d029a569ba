"""HOW to run here: what a machine has, and what a model needs of it."""
