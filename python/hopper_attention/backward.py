"""The former place of `hopper_attention.workspace_bytes`; it goes with version 0.2."""

from hopper_attention.launch.backward import workspace_bytes

__all__ = ["workspace_bytes"]
