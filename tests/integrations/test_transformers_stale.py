"""Nothing of one batch serves the next: loops refill buffers in ways that count no version."""

from __future__ import annotations

import os
import socket
from collections.abc import Callable
from contextlib import nullcontext

os.environ.setdefault("HF_HUB_OFFLINE", "1")

import pytest
import torch
import torch.multiprocessing as mp
from integrations import broadcast_positions
from torch import Tensor

transformers = pytest.importorskip("transformers")

from transformers.masking_utils import create_causal_mask  # noqa: E402

from hopper_attention.integrations import transformers as integration  # noqa: E402
from hopper_attention.integrations.transformers import NAME, attention_forward, make_mask, register  # noqa: E402

register()
LENGTH = 12
SHORT, LONG = (3, 4, 5), (8, 4)


def positions(lengths) -> Tensor:
    return torch.cat([torch.arange(n) for n in lengths])[None]


def padding(first: int) -> Tensor:
    mask = torch.ones(1, LENGTH, dtype=torch.int64)
    mask[0, :first] = 0
    return mask


def through_numpy(buffer: Tensor, new: Tensor) -> None:
    buffer.numpy()[...] = new.numpy()


def through_data(buffer: Tensor, new: Tensor) -> None:
    buffer.data.copy_(new)


def in_place(buffer: Tensor, new: Tensor) -> None:
    buffer.copy_(new)


REFILL: dict[str, Callable[[Tensor, Tensor], None]] = {
    "NumPy": through_numpy,
    ".data": through_data,
    "in place": in_place,
}


@pytest.fixture(scope="module")
def model():
    torch.manual_seed(0)
    config = transformers.LlamaConfig(
        vocab_size=97, hidden_size=64, intermediate_size=96, num_hidden_layers=2,
        num_attention_heads=4, num_key_value_heads=2, initializer_range=0.2,
    )  # fmt: skip
    return transformers.LlamaForCausalLM._from_config(
        config, attn_implementation=NAME, dtype=torch.bfloat16
    ).eval()


IDS = torch.arange(1, LENGTH + 1)[None]


def run(model, use_cache=True, **inputs) -> Tensor:
    """With a cache, transformers looks for no packing, so that the layers must."""
    return model(input_ids=IDS, use_cache=use_cache, **inputs).logits


refilled = pytest.mark.parametrize("refill", REFILL.values(), ids=REFILL)


@refilled
@pytest.mark.parametrize("use_cache", [False, True])
@pytest.mark.parametrize("masked", [False, True])
def test_positions_of_the_next_batch(model, refill, use_cache, masked):
    more = {"attention_mask": torch.ones_like(IDS)} if masked else {}
    buffer = positions(SHORT)
    with torch.no_grad():
        first = run(model, use_cache, position_ids=buffer, **more)
        refill(buffer, positions(LONG))
        second = run(model, use_cache, position_ids=buffer, **more)
        fresh = run(model, use_cache, position_ids=positions(LONG), **more)
    assert torch.equal(second, fresh) and not torch.equal(first, second)


@refilled
@pytest.mark.parametrize("as_it_came", [False, True])
def test_padding_of_the_next_batch(refill, as_it_came):
    """A padding mask that a model passes on, too."""
    layer = torch.nn.Module()
    layer.is_causal = True
    q, k, v = torch.randn(3, 1, 2, LENGTH, 16, dtype=torch.bfloat16)
    buffer = padding(2)

    def attend(mask):
        made = mask if as_it_came else make_mask(1, LENGTH, LENGTH, attention_mask=mask)
        return attention_forward(layer, q, k, v, made)[0]

    first = attend(buffer)
    refill(buffer, padding(5))
    second = attend(buffer)
    assert torch.equal(second, attend(padding(5))) and not torch.equal(first, second)


def made_ahead(model) -> Tensor:
    embeds = torch.empty(1, LENGTH, 0, dtype=torch.bfloat16)
    return create_causal_mask(model.config, embeds, torch.ones_like(IDS), None)


@refilled
def test_a_mask_made_ahead_for_several_batches(model, refill):
    """Then a pass has no mask of its own."""
    mask, buffer = made_ahead(model), positions(SHORT)
    with torch.no_grad():
        for lengths in (SHORT, LONG, SHORT):
            refill(buffer, positions(lengths))
            out = run(model, position_ids=buffer, attention_mask=mask)
            assert torch.equal(out, run(model, position_ids=positions(lengths)))


@refilled
def test_a_mask_made_ahead_after_a_call_that_failed(model, refill, monkeypatch):
    """Its first layer has looked at the positions, its second has not."""
    mask, buffer = made_ahead(model), positions(SHORT)
    function, calls = integration.flash_attn_varlen_func, []

    def fails(*arguments, **options):
        calls.append(0)
        if len(calls) == 2:
            raise RuntimeError("once")
        return function(*arguments, **options)

    monkeypatch.setattr(integration, "flash_attn_varlen_func", fails)
    with torch.no_grad():
        with pytest.raises(RuntimeError, match="once"):
            run(model, position_ids=buffer, attention_mask=mask)
        refill(buffer, positions(LONG))
        fresh = run(model, position_ids=positions(LONG))
        assert torch.equal(run(model, position_ids=buffer, attention_mask=mask), fresh)


def test_a_layer_that_meets_other_positions_looks_again():
    """A mask made ahead, another layer: neither tells the passes apart."""
    mask, buffer = make_mask(1, LENGTH, LENGTH), positions(SHORT)
    q, k, v = torch.randn(3, 1, 2, LENGTH, 16, dtype=torch.bfloat16)
    attention_forward(torch.nn.Module(), q, k, v, mask, position_ids=buffer)
    through_numpy(buffer, positions(LONG))
    other = torch.nn.Module()
    out = attention_forward(other, q, k, v, mask, position_ids=buffer)[0]
    fresh = make_mask(1, LENGTH, LENGTH)
    again = attention_forward(other, q, k, v, fresh, position_ids=positions(LONG))[0]
    assert torch.equal(out, again)


def test_layers_of_one_pass_look_once(model, monkeypatch):
    """Looking waits for the device."""
    looks, look = [], integration.cu_seqlens_of
    monkeypatch.setattr(integration, "cu_seqlens_of", lambda x: (looks.append(0), look(x))[1])
    for passes in (1, 2):
        run(model, position_ids=positions(SHORT))
        assert len(looks) == passes


# ------------------------------------------------------------------------- inference, then training


@pytest.mark.parametrize("made", ["in the pass", "ahead", "ahead, in inference mode"])
@pytest.mark.parametrize("kind", ["packed", "left", "right", "plain"])
def test_inference_first_training_later(model, kind, made):
    """With the same tensors; what inference derived cannot be saved for a backward pass."""
    buffer = positions(SHORT if kind == "packed" else (LENGTH,))
    mask = torch.ones_like(IDS)
    if kind in ("left", "right"):
        mask = padding(4) if kind == "left" else padding(4).flip(1)
    right = mask
    if made != "in the pass":
        with torch.inference_mode() if made.endswith("mode") else nullcontext():
            embeds = torch.empty(1, LENGTH, 0, dtype=torch.bfloat16)
            mask = create_causal_mask(model.config, embeds, mask, None)
    gradients = []
    with torch.inference_mode():
        run(model, position_ids=buffer, attention_mask=mask)
    for given in (mask, right):
        model.zero_grad()
        run(model, position_ids=buffer, attention_mask=given).float().square().mean().backward()
        gradients.append(model.model.layers[0].self_attn.k_proj.weight.grad.clone())
    model.zero_grad()
    assert torch.equal(*gradients)


def test_positions_made_in_inference_mode(model):
    with torch.inference_mode():
        buffer = positions(SHORT)
        first = run(model, position_ids=buffer)
    run(model, position_ids=buffer).float().mean().backward()
    model.zero_grad()
    with torch.inference_mode():
        buffer.copy_(positions(LONG))
        assert not torch.equal(run(model, position_ids=buffer), first)


# ---------------------------------------------------------------------------- other default devices


@pytest.mark.parametrize("packed", [False, True])
@pytest.mark.parametrize("mask", [None, padding(4), padding(4).flip(1)])
def test_a_default_device_is_not_used(mask, packed):
    """And leaves nothing behind for calls after it."""
    q, k, v = torch.randn(3, 1, 2, LENGTH, 16, dtype=torch.bfloat16)
    layer, places = torch.nn.Module(), positions(SHORT if packed else (LENGTH,))

    def attend():
        made = make_mask(1, LENGTH, LENGTH, attention_mask=mask, device=q.device)
        return attention_forward(layer, q, k, v, made, position_ids=places)[0]

    fresh = attend()
    with torch.device("meta"):
        made = make_mask(1, LENGTH, LENGTH, attention_mask=mask)
        made_static = make_mask(1, 1, LENGTH, q_offset=torch.tensor(3, device="cpu"))
        inside = attend()
    assert made.device.type == made_static.device.type == inside.device.type == "cpu"
    assert torch.equal(inside, fresh) and torch.equal(attend(), fresh)


def test_a_model_under_another_default_device(model):
    """transformers' own tensors may go there and fail the call; the next one is right."""
    buffer = positions(SHORT)
    with torch.no_grad():
        fresh = run(model, position_ids=buffer.clone())
        try:
            with torch.device("meta"):
                run(model, position_ids=buffer)
        except (RuntimeError, NotImplementedError, TypeError):
            pass
        assert torch.equal(run(model, position_ids=buffer), fresh)


# -------------------------------------------------------------------------------------- collectives


@pytest.mark.distributed
def test_positions_from_a_collective():
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        port = free.getsockname()[1]
    results = mp.get_context("spawn").SimpleQueue()
    mp.spawn(broadcast_positions.receive, (port, results), nprocs=2)
    sums = dict(results.get() for _ in range(2))
    assert sums[0] == sums[1]
    assert sums[1][0] == sums[1][1] != sums[1][2] == sums[1][3]
