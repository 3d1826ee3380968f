"""The tiers of the place axis: kinds of memory that slots can lie in. One file, one tier."""
