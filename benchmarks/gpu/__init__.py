"""Compressed tables on a GPU: whether the kernels are right, how fast they are, what they save."""
