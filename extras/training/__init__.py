"""Training: the recipe of the bundled model, and what teaches a model something new."""
