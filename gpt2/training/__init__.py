"""A training run: its settings, its steps, its folder, and what is shown of it."""
