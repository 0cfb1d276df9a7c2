"""The network sees its own document only, and the implementations of attention agree in it."""

import pytest
import torch
import torch.nn.functional as F

from gpt.attention import Kind, SdpaBackend, choose
from gpt.data import Packing
from gpt.model import GPT, GPTConfig, rope
from gpt.stopwatch import TimedAttention

CONFIG = GPTConfig(layers=2, dim=64, heads=4, heads_kv=2, hidden=64, context=48)
LENGTHS = (20, 1, 48, 17)
TOTAL = sum(LENGTHS)
KINDS = list(Kind)


@pytest.fixture
def model():
    torch.manual_seed(0)
    return GPT(CONFIG)


def attention(kind):
    return choose(kind, SdpaBackend.AUTO)


def random_ids(count=TOTAL):
    return torch.randint(256, (count,), generator=torch.Generator().manual_seed(1))


def logits(model, kind, ids, packing):
    with torch.autocast("cpu", dtype=torch.bfloat16):
        return model(ids, packing, attention(kind))


def leaks(model, kind, packing):
    """A document is True if its logits change with the bytes of document 2."""
    ids = random_ids()
    changed = ids.clone()
    start, end = sum(LENGTHS[:2]), sum(LENGTHS[:3])
    changed[start:end] = 255 - changed[start:end]
    with torch.no_grad():
        before, after = (logits(model, kind, x, packing) for x in (ids, changed))
    differs = (before != after).any(dim=1).split(LENGTHS)
    return [bool(document.any()) for document in differs]


@pytest.mark.parametrize("kind", KINDS)
def test_documents_do_not_see_one_another(model, kind):
    packing = Packing.of(LENGTHS, CONFIG.context, sequences=6)
    assert leaks(model, kind, packing) == [False, False, True, False]


@pytest.mark.parametrize("kind", KINDS)
def test_that_test_sees_a_leak(model, kind):
    """A packing with one boundary too few lets document 3 see document 2."""
    merged = Packing.of((*LENGTHS[:2], LENGTHS[2] + LENGTHS[3]), sum(LENGTHS))
    assert leaks(model, kind, merged) == [False, False, True, True]


@pytest.mark.parametrize("kind", KINDS)
def test_no_token_sees_later_ones(model, kind):
    packing = Packing.of((30,), CONFIG.context)
    ids = random_ids(30)
    changed = ids.clone()
    changed[20] = 255 - changed[20]
    with torch.no_grad():
        before, after = (logits(model, kind, x, packing) for x in (ids, changed))
    same = (before == after).all(dim=1).tolist()
    assert same == [True] * 20 + [False] * 10


@pytest.mark.parametrize("kind", KINDS)
def test_a_document_is_the_same_in_a_pack_and_alone(model, kind):
    """Positions restart: a document's place in a pack does not matter."""
    ids = random_ids()
    with torch.no_grad():
        packed = logits(model, kind, ids, Packing.of(LENGTHS, CONFIG.context))
        alone = [
            logits(model, kind, part, Packing.of((len(part),), CONFIG.context))
            for part in ids.split(LENGTHS)
        ]
    torch.testing.assert_close(packed, torch.cat(alone), atol=0.03, rtol=0)


def test_rope_restarts_and_is_relative():
    positions = Packing.of((3, 4), CONFIG.context).positions
    assert positions.tolist() == [0, 1, 2, 0, 1, 2, 3]
    cos, sin = rope(positions, 16, 10000.0)
    assert torch.equal(cos[0], torch.ones(1, 8)) and torch.equal(sin[3], torch.zeros(1, 8))
    torch.testing.assert_close((cos[:3], sin[:3]), (cos[3:6], sin[3:6]))


def run(model, kind, packing):
    """(loss, gradients by name)."""
    ids = random_ids()
    model.zero_grad()
    loss = F.cross_entropy(logits(model, kind, ids, packing), ids.roll(-1))
    loss.backward()
    return loss.item(), {name: p.grad.clone() for name, p in model.named_parameters()}


@pytest.mark.parametrize("full", [False, True])
def test_implementations_agree(model, full):
    """Two correct ones differ by bf16's rounding: its epsilon is 2^-8."""
    lengths = (43, 43) if full else LENGTHS
    packing = Packing.of(lengths, max(lengths), full=full)
    loss, gradients = run(model, Kind.REFERENCE, packing)
    sdpa_loss, sdpa_gradients = run(model, Kind.SDPA, packing)
    assert abs(loss - sdpa_loss) < 2e-3
    for name, gradient in gradients.items():
        error = (gradient - sdpa_gradients[name]).norm() / gradient.norm()
        assert error < 4 * 2**-8, name


@pytest.mark.parametrize("full", [False, True])
def test_on_a_cpu_the_public_functions_are_the_reference(model, full):
    packing = Packing.of((43, 43), 43, full=full)
    loss, gradients = run(model, Kind.REFERENCE, packing)
    public_loss, public_gradients = run(model, Kind.HOPPER, packing)
    assert loss == public_loss
    for name, gradient in gradients.items():
        assert torch.equal(gradient, public_gradients[name]), name


def test_recomputed_activations_are_the_same(model):
    packing = Packing.of(LENGTHS, CONFIG.context)
    loss, gradients = run(model, Kind.SDPA, packing)
    model.recompute = True
    again, same_gradients = run(model, Kind.SDPA, packing)
    assert loss == again
    for name, gradient in gradients.items():
        assert torch.equal(gradient, same_gradients[name]), name


@pytest.mark.parametrize("recompute", [False, True])
def test_attention_is_timed_in_both_directions(model, recompute):
    """Once a layer in forward, once in backward; recomputed, forward twice."""
    model.recompute = recompute
    watch = TimedAttention(attention(Kind.SDPA), torch.device("cpu"))
    ids, packing = random_ids(), Packing.of(LENGTHS, CONFIG.context)
    for timed in (False, True):
        with torch.autocast("cpu", dtype=torch.bfloat16):
            if timed:
                with watch.timing():
                    model(ids, packing, watch).sum().backward()
            else:
                model(ids, packing, watch).sum().backward()
                assert watch.marks == []
    assert len(watch.marks) == CONFIG.layers * (3 if recompute else 2)
    assert 0 < watch.seconds < 10


def test_configs_are_checked():
    with pytest.raises(ValueError, match="multiple of 8"):
        GPTConfig(layers=1, dim=36, heads=4, heads_kv=2, hidden=8, context=8)
    with pytest.raises(ValueError, match="KV heads"):
        GPTConfig(layers=1, dim=32, heads=4, heads_kv=3, hidden=8, context=8)
