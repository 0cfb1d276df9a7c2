"""cuDNN's FP8 forward through its graph frontend, with scales of one."""

from __future__ import annotations

import torch
from hopper_attention.benchmarks.peers.common import refuse_if, require
from torch import Tensor

from hopper_attention.bench.measure.inputs import Inputs
from hopper_attention.bench.measure.runner import Prepared

SCALES = ("descale_q", "descale_k", "descale_v", "descale_s", "scale_s", "scale_o")


class CudnnFp8:
    name = "cuDNN FP8"

    def prepare(self, inputs: Inputs) -> Prepared:
        problem = inputs.problem
        refuse_if(problem.dtype != "fp8", "FP8 only")
        refuse_if(problem.direction != "forward", "forward only")
        refuse_if(problem.lengths or problem.window >= 0, "dense batches without windows only")
        cudnn = require("cudnn")
        fp8, single = cudnn.data_type.FP8_E4M3, cudnn.data_type.FLOAT
        graph = cudnn.pygraph(
            io_data_type=fp8, intermediate_data_type=single, compute_data_type=single
        )
        q, k, v = (x.transpose(1, 2) for x in (inputs.q, inputs.k, inputs.v))  # (b, h, s, d)
        out = torch.empty_like(inputs.q)
        one = torch.ones(1, 1, 1, 1, device=q.device)
        amax_s, amax_o = torch.zeros_like(one), torch.zeros_like(one)
        nodes = {
            name: graph.tensor(name=name, dim=list(x.shape), stride=list(x.stride()), data_type=fp8)
            for name, x in (("q", q), ("k", k), ("v", v))
        }
        scales = {name: graph.tensor_like(one) for name in SCALES}
        alignment = cudnn.diagonal_alignment.TOP_LEFT
        out_node, _stats, amax_s_node, amax_o_node = graph.sdpa_fp8(
            **nodes,
            **scales,
            is_inference=True,
            attn_scale=problem.head_dim**-0.5,
            diagonal_alignment=alignment,
            right_bound=0 if problem.causal else None,
        )
        bhsd = out.transpose(1, 2)
        out_node.set_output(True).set_dim(list(bhsd.shape)).set_stride(list(bhsd.stride()))
        out_node.set_data_type(fp8)
        for node in (amax_s_node, amax_o_node):
            node.set_output(True).set_dim([1, 1, 1, 1]).set_stride([1, 1, 1, 1])
            node.set_data_type(single)
        graph.build([cudnn.heur_mode.A, cudnn.heur_mode.FALLBACK])
        workspace = torch.empty(graph.get_workspace_size(), dtype=torch.uint8, device=q.device)
        tensors = {
            **{nodes[name]: x.view(torch.uint8) for name, x in (("q", q), ("k", k), ("v", v))},
            **dict.fromkeys(scales.values(), one),
            out_node: bhsd.view(torch.uint8),
            amax_s_node: amax_s,
            amax_o_node: amax_o,
        }

        def forward() -> tuple[Tensor]:
            graph.execute(tensors, workspace)
            return (out,)

        return Prepared(forward)
