"""From a problem to the name of the compiled instance that solves it.

The manifest that the build writes is the only list: what was not compiled is not supported.
"""

from __future__ import annotations

import functools

from hopper_attention import manifest


@functools.cache
def forward_instance(dtype: str, head_dim: int, causal: bool) -> str:
    """Raises NotImplementedError, naming the nearest head dim, if nothing matches."""
    configs = {
        name: instance.config
        for name, instance in manifest.instances().items()
        if instance.family == "forward"
    }
    head_dims = {}
    for name, config in configs.items():
        if (config["dtype"], config["causal"]) == (dtype, causal):
            head_dims[config["head_dim"]] = name
    if head_dim in head_dims:
        return head_dims[head_dim]
    if not head_dims:
        raise NotImplementedError(
            f"no forward kernel for {dtype}, causal={causal} in this build; it holds "
            f"{', '.join(configs)}; rebuild with HOPPER_ATTENTION_INSTANCES=core"
        )
    nearest = min(head_dims, key=lambda d: (abs(d - head_dim), -d))
    raise NotImplementedError(
        f"head_dim {head_dim} of q is not supported; supported in this build: "
        f"{', '.join(map(str, sorted(head_dims)))} (nearest: {nearest})"
    )
