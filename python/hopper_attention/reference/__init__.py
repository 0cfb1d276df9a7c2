"""The truth: attention and quantisation stated plainly in PyTorch, and errors beside it."""

from hopper_attention.reference.exact import attention, gradients, visible

__all__ = ["attention", "gradients", "visible"]
