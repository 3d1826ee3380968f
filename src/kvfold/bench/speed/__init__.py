"""Models of a shape, stages of time, bandwidth: what the speed suite measures with."""
