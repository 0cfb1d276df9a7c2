"""What the backward kernels of every architecture share."""
