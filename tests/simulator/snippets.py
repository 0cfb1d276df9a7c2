"""Hand-written PTX around a few instructions under test.

``run`` gives every thread its row of ``inputs`` in %a0, %a1, ... and stores %d0, %d1, ... as its
row of the result.  Registers are 32 bits wide except %rd (64), %rs (16) and %p (predicates).
"""

import numpy as np

from hopper_attention import simulator

_TEMPLATE = """
.version 8.7
.target sm_90a
.address_size 64
.extern .shared .align 1024 .b8 memory[];
.visible .entry snippet(
    .param .u64 inputs,
    .param .u64 outputs,
    .param .align 64 .b8 map[128]
)
{{
    .reg .pred %p<32>;
    .reg .b16 %rs<32>;
    .reg .b32 %r<512>, %a<64>, %d<64>;
    .reg .b64 %rd<64>;
    ld.param.b64 %rd60, [inputs];
    ld.param.b64 %rd61, [outputs];
    mov.u32 %r500, %tid.x;
    mad.wide.u32 %rd62, %r500, {input_bytes}, %rd60;
    mad.wide.u32 %rd63, %r500, {output_bytes}, %rd61;
    {loads}
    {body}
    {stores}
    ret;
}}
"""


def module(body: str, inputs: int = 0, outputs: int = 0) -> simulator.Module:
    """The kernel ``snippet`` with this body."""
    loads = "\n".join(f"ld.global.b32 %a{k}, [%rd62+{4 * k}];" for k in range(inputs))
    stores = "\n".join(f"st.global.b32 [%rd63+{4 * k}], %d{k};" for k in range(outputs))
    return simulator.Module.parse(
        _TEMPLATE.format(
            body=body, loads=loads, stores=stores, input_bytes=4 * inputs, output_bytes=4 * outputs
        )
    )


def run(
    body: str,
    inputs: np.ndarray | None = None,
    outputs: int = 1,
    threads: int = 32,
    seed: int = 0,
    shared: int = 0,
    tensor_map: bytes = bytes(128),
    extra: tuple[np.ndarray, ...] = (),
    hazards: str = "raise",
    per_thread: bool = True,
    fp8_accumulator_bits: int | None = None,
) -> np.ndarray:
    """Results as uint32, (threads, outputs).

    inputs: 32-bit values, (threads, k); with per_thread=False an array that the body reads through
    %rd60.  extra: further arrays that the kernel may touch.
    """
    if inputs is None:
        inputs = np.zeros((threads, 0), np.uint32)
    result = np.full((threads, outputs), 0xDEADBEEF, np.uint32)
    memory = simulator.GlobalMemory()
    for number, array in enumerate((inputs, result, *extra)):
        if array.nbytes:
            memory.register(array.ctypes.data, array.nbytes, f"array {number}")
    count = inputs.shape[1] if per_thread else 0
    params = [np.uint64(x.ctypes.data).tobytes() for x in (inputs, result)] + [tensor_map]
    simulator.launch(
        module(body, count, outputs),
        "snippet",
        grid=(1, 1, 1),
        block=(threads, 1, 1),
        params=params,
        memory=memory,
        shared_memory_bytes=shared,
        options=simulator.Options(seed, hazards, fp8_accumulator_bits),
    )
    return result
