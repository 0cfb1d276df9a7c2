"""Code that the backward kernels of every architecture share."""
