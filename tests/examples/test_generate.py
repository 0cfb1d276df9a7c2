"""Sampling."""

import pytest
import torch

from generate import Decoder, draw, generate
from gpt.attention import Kind, SdpaBackend, choose
from gpt.data import BOUNDARY, Packing
from gpt.model import GPT, GPTConfig

CONFIG = GPTConfig(layers=2, dim=32, heads=4, heads_kv=2, hidden=64, context=24, tied=False)
CPU = torch.device("cpu")


@pytest.fixture
def model():
    torch.manual_seed(2)
    model = GPT(CONFIG).eval()
    with torch.no_grad():  # likeliest bytes that stand out, and differ from place to place
        for parameter in model.parameters():
            if parameter.ndim > 1:
                parameter.mul_(8)
    return model


def uncached(model, ids):
    """Logits of all of the text at once, (tokens, vocabulary)."""
    attend = choose(Kind.REFERENCE, SdpaBackend.AUTO)
    with torch.no_grad(), torch.autocast("cpu", dtype=torch.bfloat16):
        return model(torch.tensor(ids), Packing.of([len(ids)], len(ids)), attend)


def test_the_cache_does_not_change_what_is_likeliest(model):
    prompt = b"a prompt"
    cached = bytes(generate(model, prompt, count=12, temperature=0))
    ids = [BOUNDARY, *prompt]
    for _ in range(len(cached)):
        ids.append(int(uncached(model, ids)[-1].argmax()))
    assert cached == bytes(ids[len(prompt) + 1 :])
    assert len(set(cached)) > 2


@pytest.mark.parametrize("parts", [(1, 1, 1, 1, 1), (3, 2), (5,), (1, 4)])
def test_tokens_may_come_in_any_parts(model, parts):
    ids = [1, 50, 3, 7, 200]
    decoder = Decoder(model, len(ids), CPU)
    pieces = torch.tensor(ids).split(parts)
    logits = torch.cat([decoder.logits(piece.tolist()) for piece in pieces])
    expected = uncached(model, ids)
    torch.testing.assert_close(logits, expected, atol=0.02 * expected.abs().max().item(), rtol=0)


def test_text_may_be_longer_than_the_context(model):
    text = bytes(generate(model, b"x" * 40, count=40, top_k=5))
    assert len(text) == 40 or BOUNDARY not in text


def test_equal_seeds_draw_equal_text(model):
    a, b, c = (bytes(generate(model, b"seed", count=16, seed=seed)) for seed in (0, 0, 1))
    assert a == b != c


def test_draw():
    logits = torch.tensor([0.0, 3.0, 2.0, -1.0])
    generator = torch.Generator().manual_seed(0)
    assert draw(logits, 0, 0, generator) == 1
    assert {draw(logits, 1.0, 2, generator) for _ in range(60)} == {1, 2}
    assert {draw(logits, 5.0, 0, generator) for _ in range(200)} == {0, 1, 2, 3}
    assert {draw(logits, 0.01, 0, generator) for _ in range(20)} == {1}
