"""Kernels for GPUs, each of which must agree with a slower file of the folder above. One file, one kind of part."""
