"""Training of SONIC."""
