"""Training of the shipped tiny model."""
