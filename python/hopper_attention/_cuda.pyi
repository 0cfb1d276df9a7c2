"""Types of the extension that launches on a GPU; python/bindings/module.cpp."""

from collections.abc import Sequence
from typing import Any

TensorArgument = tuple[int, Sequence[int], Sequence[int]]

def instances() -> list[str]: ...
def load(name: str, device: int) -> None: ...
def launch(
    name: str,
    device: int,
    stream: int,
    tensors: Sequence[TensorArgument],
    scalars: Sequence[float],
) -> None: ...
def runtime_info() -> dict[str, Any]: ...
