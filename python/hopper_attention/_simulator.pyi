"""Types of the extension that hands launches to Python; python/bindings/module.cpp."""

from collections.abc import Callable, Sequence

Triple = tuple[int, int, int]
LaunchHandler = Callable[[str, Triple, Triple, Triple, int, list[int]], object]
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
def set_launch_handler(handler: LaunchHandler | None) -> None: ...
