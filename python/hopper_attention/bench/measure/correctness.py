"""Results against FP64 on sampled rows, before anything is timed.

The criterion is the project's: at most twice the error of PyTorch operations in the same dtype.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from hopper_attention.bench.measure.inputs import DTYPES, Inputs
from hopper_attention.reference.error import FLOOR, Error, cancellation

SAMPLES = 3
"""(sequence, key head) pairs."""
ROWS = 64
"""Rows of each query head that are judged."""
CHUNK = 1024
"""Query rows at once in backward: memory is CHUNK * seqlen_k elements of 8 bytes."""
FP8_P_SCALE = 256.0
"""The factor of P in FP8 kernels, with which small probabilities survive e4m3."""


@dataclass(frozen=True)
class Precision:
    """In which dtype sums are made, and how P, dS and results are rounded on the way."""

    dtype: torch.dtype
    round: Callable[[Tensor], Tensor]
    result: torch.dtype

    @staticmethod
    def exact() -> Precision:
        return Precision(torch.float64, lambda x: x, torch.float64)

    @staticmethod
    def like(name: str, result: torch.dtype) -> Precision:
        """Errors of the tensor cores: operands in the dtype, sums in FP32, results as judged."""
        dtype = DTYPES[name]
        if name == "fp8":
            scaled = lambda x: (x * FP8_P_SCALE).to(dtype).float() / FP8_P_SCALE  # noqa: E731
            return Precision(torch.float32, scaled, result)
        return Precision(torch.float32, lambda x: x.to(dtype).float(), result)


@dataclass(frozen=True)
class Verdict:
    ours: Error
    """Errors of the judged result: the worst of its tensors and samples."""
    pytorch: Error
    passed: bool

    def as_dict(self) -> dict[str, float]:
        return {
            "maximum": self.ours.maximum,
            "rms": self.ours.rms,
            "pytorch_maximum": self.pytorch.maximum,
            "pytorch_rms": self.pytorch.rms,
        }


def judge(inputs: Inputs, results: Sequence[Tensor]) -> Verdict:
    """`results`: (out,) or, of backward, (dq, dk, dv), in the layouts of the inputs."""
    exact, rounded = Precision.exact(), Precision.like(inputs.problem.dtype, results[0].dtype)
    floor, verdicts = _floor(inputs), []
    for sequence, head in inputs.samples(SAMPLES):
        actual = _slices(inputs, results, sequence, head)
        compute = _gradients if inputs.problem.direction == "backward" else _rows_of_out
        truth = compute(inputs, sequence, head, exact)
        reference = compute(inputs, sequence, head, rounded)
        rows = _row_sample(inputs, sequence)
        for tensor, a, b in zip(actual, truth, reference, strict=True):
            if inputs.problem.direction != "backward":
                tensor = tensor[:, rows]
            verdicts.append((Error.of(tensor, a), Error.of(b, a)))
    return Verdict(
        ours=_worst(ours for ours, _ in verdicts),
        pytorch=_worst(theirs for _, theirs in verdicts),
        passed=all(ours.within_twice(theirs, floor) for ours, theirs in verdicts),
    )


def _floor(inputs: Inputs) -> float:
    """Below it nothing is judged."""
    if inputs.grad_out is None:
        return FLOOR
    scale = 1 / math.sqrt(inputs.problem.head_dim)
    q, k, v, grad_out = (x.detach() for x in (inputs.q, inputs.k, inputs.v, inputs.grad_out))
    return FLOOR + cancellation(q, k, v, grad_out, scale)


def _worst(errors: Iterable[Error]) -> Error:
    errors = list(errors)
    return Error(max(e.maximum for e in errors), max(e.rms for e in errors))


def _slices(
    inputs: Inputs, results: Sequence[Tensor], sequence: int, head: int
) -> tuple[Tensor, ...]:
    """(group, queries, d) of out or dq; (keys, d) of dk and dv."""
    group = _group(inputs, head)
    first = inputs.queries(results[0], sequence)[:, group].transpose(0, 1)
    return (first, *(inputs.keys(result, sequence)[:, head] for result in results[1:]))


def _group(inputs: Inputs, head: int) -> slice:
    """The query heads of a key head."""
    size = inputs.problem.heads // inputs.problem.heads_kv
    return slice(head * size, (head + 1) * size)


def _row_sample(inputs: Inputs, sequence: int) -> Tensor:
    """Row numbers, the first and the last among them."""
    count = inputs.problem.sequences[sequence][0]
    return torch.linspace(0, count - 1, min(ROWS, count)).round().long()


def _operands(inputs: Inputs, sequence: int, head: int, dtype: torch.dtype) -> tuple[Tensor, ...]:
    """q (group, queries, d), k (keys, d), v (keys, dv)."""
    q = inputs.queries(inputs.q.detach(), sequence)[:, _group(inputs, head)].transpose(0, 1)
    k = inputs.keys(inputs.k.detach(), sequence)[:, head]
    v = inputs.keys(inputs.v.detach(), sequence)[:, head]
    return q.to(dtype), k.to(dtype), v.to(dtype)


def _visible(inputs: Inputs, rows: Tensor, queries: int, keys: int) -> Tensor:
    """(rows, keys) mask, aligned to the bottom right."""
    problem = inputs.problem
    row = rows[:, None].to(inputs.q.device) + keys - queries
    key = torch.arange(keys, device=inputs.q.device)[None]
    mask = (key <= row) if problem.causal else torch.ones_like(key <= row)
    return mask & (key >= row - problem.window) if problem.window >= 0 else mask


def _probabilities(inputs: Inputs, head: int, q: Tensor, k: Tensor, mask: Tensor) -> Tensor:
    """(group, rows, keys), rows without keys 0."""
    problem = inputs.problem
    scores = q @ k.T / math.sqrt(problem.head_dim)
    if problem.softcap:
        scores = problem.softcap * torch.tanh(scores / problem.softcap)
    scores = scores.masked_fill(~mask, -math.inf)
    if inputs.sink is not None:
        sink = inputs.sink[_group(inputs, head)].to(scores.dtype)[:, None, None]
        scores = torch.cat([scores, sink.expand(*scores.shape[:2], 1)], dim=-1)
        return scores.softmax(-1)[..., :-1]
    return scores.softmax(-1).nan_to_num(0.0)


def _rows_of_out(
    inputs: Inputs, sequence: int, head: int, precision: Precision
) -> tuple[Tensor, ...]:
    q, k, v = _operands(inputs, sequence, head, precision.dtype)
    rows = _row_sample(inputs, sequence)
    mask = _visible(inputs, rows, q.shape[1], k.shape[0])
    p = _probabilities(inputs, head, q[:, rows], k, mask)
    return ((precision.round(p) @ v).to(precision.result),)


def _gradients(
    inputs: Inputs, sequence: int, head: int, precision: Precision
) -> tuple[Tensor, ...]:
    """dq (group, queries, d), dk (keys, d), dv (keys, dv) of plain softmax attention.

    Like PyTorch's, cuDNN's and every other backward that is given a rounded out, the one in low
    precision takes rowsum(dO * out) of it: rows with few keys have their largest error from there.
    """
    assert inputs.grad_out is not None
    q, k, v = _operands(inputs, sequence, head, precision.dtype)
    grad_out = inputs.queries(inputs.grad_out, sequence)[:, _group(inputs, head)]
    grad_out = grad_out.transpose(0, 1).to(precision.dtype)
    scale = 1 / math.sqrt(inputs.problem.head_dim)
    dq, dk, dv = torch.zeros_like(q), torch.zeros_like(k), torch.zeros_like(v)
    for start in range(0, q.shape[1], CHUNK):
        rows = torch.arange(start, min(start + CHUNK, q.shape[1]))
        mask = _visible(inputs, rows, q.shape[1], k.shape[0])
        chunk, grad = q[:, rows], grad_out[:, rows]
        p = _probabilities(inputs, head, chunk, k, mask)
        dv += (precision.round(p).transpose(1, 2) @ grad).sum(0)
        dp = grad @ v.T
        out = precision.round(precision.round(p) @ v)
        ds = p * (dp - (grad * out).sum(-1, keepdim=True)) * scale
        if inputs.problem.softcap:
            scores = chunk @ k.T * scale
            ds = ds * (1 - torch.tanh(scores / inputs.problem.softcap).square())
        dq[:, rows] = precision.round(ds) @ k
        dk += (precision.round(ds).transpose(1, 2) @ chunk).sum(0)
    return tuple(gradient.to(precision.result) for gradient in (dq, dk, dv))
