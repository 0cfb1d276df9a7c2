"""Other implementations, each behind the interface `hopper_attention.bench.measure.runner.Peer`.

None of their packages is imported before a problem is prepared for it; one that is missing, or does
not support the problem, says so and is skipped.
"""

from hopper_attention.benchmarks.peers.cudnn_fp8 import CudnnFp8
from hopper_attention.benchmarks.peers.flash_attn_api import FlashAttnApi
from hopper_attention.benchmarks.peers.flashinfer import FlashInfer
from hopper_attention.benchmarks.peers.flex_attention import FlexAttention
from hopper_attention.benchmarks.peers.ours_fp8 import OursFp8
from hopper_attention.benchmarks.peers.sdpa import Sdpa

from hopper_attention.bench.measure.runner import Peer
from hopper_attention.problem.values import PrecisionOptions

PEERS: tuple[Peer, ...] = (
    FlashAttnApi("hopper-attention", "hopper_attention", dtypes=("bf16", "fp16", "fp8")),
    OursFp8("hopper-attention, one level", PrecisionOptions(two_level=False)),
    OursFp8(
        "hopper-attention, one level, V arranged", PrecisionOptions(two_level=False), arranged=True
    ),
    OursFp8("hopper-attention, codes", PrecisionOptions(exact_softmax=False)),
    OursFp8(
        "hopper-attention, codes, one level", PrecisionOptions(two_level=False, exact_softmax=False)
    ),
    FlashAttnApi(
        "hopper-attention, Ampere's", "hopper_attention", dtypes=("bf16", "fp16"), backend="ampere"
    ),
    FlashAttnApi("flash-attn-4", "flash_attn.cute", dtypes=("bf16", "fp16")),
    Sdpa("torch cuDNN", "CUDNN_ATTENTION"),
    Sdpa("torch flash", "FLASH_ATTENTION"),
    Sdpa("torch efficient", "EFFICIENT_ATTENTION"),
    CudnnFp8(),
    FlexAttention(),
    FlashInfer(),
)
"""In the order of the tables; the first is ours."""
