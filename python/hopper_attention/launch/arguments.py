"""Steps that several launches share: addresses by name, batch entries, rows of no sequence."""

from __future__ import annotations

import torch
from torch import Tensor

from hopper_attention.problem.values import Inputs


def clear_unused(inputs: Inputs, out: Tensor, lse: Tensor) -> None:
    """Rows of no sequence: on a GPU only where asked for, since it costs a pass over out."""
    if inputs.varlen and (inputs.queries.seqused is not None or not inputs.q.is_cuda):
        out.zero_()
        lse.fill_(-torch.inf)


def addressed(inputs: Inputs) -> tuple[dict[str, int], tuple[Tensor, ...]]:
    """Scalar arguments that stand for tensors, by name, with the number of sequences; and these."""
    _, _, _, sink, queries, keys = inputs
    pointers = {
        "learnable_sink": sink,
        "cu_seqlens_q": queries.cu_seqlens,
        "cu_seqlens_k": keys.cu_seqlens,
        "seqused_q": queries.seqused,
        "seqused_k": keys.seqused,
    }
    given = {name: tensor for name, tensor in pointers.items() if tensor is not None}
    numbers = {name: tensor.data_ptr() for name, tensor in given.items()}
    return numbers | {"num_sequences": inputs.sequences}, tuple(given.values())


def as_entry(tensor: Tensor, rank: int) -> Tensor:
    """Packed tensors are one batch entry."""
    return tensor.unsqueeze(0) if tensor.ndim < rank else tensor
