"""The pattern that a mask was asked for decides, whatever layers say of themselves.

And models that would not call our attention are refused.
"""

from __future__ import annotations

import os
from types import SimpleNamespace

os.environ.setdefault("HF_HUB_OFFLINE", "1")

import pytest
import torch
from torch.nn.functional import scaled_dot_product_attention

transformers = pytest.importorskip("transformers")

from transformers.masking_utils import (  # noqa: E402
    bidirectional_mask_function,
    create_bidirectional_sliding_window_mask,
    create_causal_mask,
    create_sliding_window_causal_mask,
)

from hopper_attention.integrations.transformers import NAME, attention_forward, make_mask, register  # noqa: E402

register()
TOKENS = 9


class Layer(torch.nn.Module):
    """A layer has the attributes of `says`; without any, it does not say whether it is causal."""

    def __init__(self, **says):
        super().__init__()
        self.config = SimpleNamespace(model_type="made_up")
        for name, value in says.items():
            setattr(self, name, value)


def heads(queries=TOKENS, keys=TOKENS, batch=2):
    torch.manual_seed(0)
    shapes = ((batch, 2, queries, 16), (batch, 2, keys, 16), (batch, 2, keys, 16))
    return [torch.randn(shape, dtype=torch.bfloat16) for shape in shapes]


def expected(q, k, v, visible):
    out = scaled_dot_product_attention(q.float(), k.float(), v.float(), attn_mask=visible)
    return out.transpose(1, 2)


def visible(queries=TOKENS, keys=TOKENS, *, causal=True, left=None, right=None):
    query = torch.arange(queries)[:, None] + keys - queries
    key = torch.arange(keys)
    seen = key <= query if causal else torch.ones(queries, keys, dtype=torch.bool)
    if left is not None:
        seen = seen & (key >= query - left)
    return seen if right is None else seen & (key <= query + right)


def asked(causal, queries=TOKENS, keys=TOKENS, batch=2, **more):
    skip = {} if causal else {"allow_is_bidirectional_skip": True}
    return make_mask(batch, queries, keys, q_offset=keys - queries, **skip, **more)


def assert_attends(layer, mask, right, inputs=None, **told):
    inputs = inputs or heads()
    out, _ = attention_forward(layer, *inputs, mask, **told)
    torch.testing.assert_close(out.float(), expected(*inputs, right), rtol=0, atol=0.02)


SAYS = [{}, {"is_causal": True}, {"is_causal": False}]


@pytest.mark.parametrize("causal", [True, False])
@pytest.mark.parametrize("says", SAYS, ids=str)
def test_causality_is_the_masks(causal, says):
    assert_attends(Layer(**says), asked(causal), visible(causal=causal))
    padded = torch.ones(2, TOKENS, dtype=torch.int64)
    padded[0, :3] = 0
    out, _ = attention_forward(Layer(**says), *heads(), asked(causal, attention_mask=padded))
    right = expected(*heads(), visible(causal=causal) & padded.bool()[:, None, None])
    rows = padded.bool()
    torch.testing.assert_close(out.float()[rows], right[rows], rtol=0, atol=0.02)


@pytest.mark.parametrize("says", SAYS, ids=str)
def test_causality_that_is_told_beside_a_mask_is_ignored(says):
    for causal in (True, False):
        mask, right = asked(causal), visible(causal=causal)
        assert_attends(Layer(**says), mask, right, is_causal=not causal)


def config(**changes):
    made = transformers.MistralConfig(
        hidden_size=32, num_attention_heads=2, num_hidden_layers=1, vocab_size=32, **changes
    )
    made._attn_implementation = NAME
    return made


@pytest.mark.parametrize("told", [None, 2, 3, 4, 100])
def test_windows_are_the_masks(told):
    """A causal window of 3 shows 2 keys before; one of an encoder shows 3 before and 3 behind."""
    embeds = torch.zeros(2, TOKENS, 32)
    mask = create_sliding_window_causal_mask(config(sliding_window=3), embeds, None, None)
    assert_attends(Layer(is_causal=True), mask, visible(left=2), sliding_window=told)
    mask = create_bidirectional_sliding_window_mask(config(sliding_window=3), embeds, None)
    right = visible(causal=False, left=3, right=3)
    assert_attends(Layer(is_causal=False), mask, right, sliding_window=told)


def test_a_window_that_is_told_beside_a_mask_without_one_is_ignored():
    mask = create_causal_mask(config(sliding_window=3), torch.zeros(2, TOKENS, 32), None, None)
    assert_attends(Layer(is_causal=True), mask, visible(), sliding_window=3)


def test_a_local_size_beside_a_function_without_one_is_ignored():
    mask = asked(False, mask_function=bidirectional_mask_function, local_size=3)
    assert_attends(Layer(), mask, visible(causal=False))


def test_chunks_are_the_masks():
    """Nothing else says so: the layer has no layer_types."""
    mask = asked(True, local_size=4, config=SimpleNamespace(attention_chunk_size=4))
    place = torch.arange(TOKENS) // 4
    assert_attends(Layer(), mask, visible() & (place[:, None] == place))


def test_a_local_size_that_may_be_a_chunk_or_a_window_is_refused():
    both = SimpleNamespace(attention_chunk_size=4, sliding_window=4)
    with pytest.raises(NotImplementedError, match="attention_chunk_size and sliding_window"):
        asked(True, local_size=4, config=both)


def test_a_window_on_both_sides_of_queries_that_are_not_the_last_is_refused():
    function = {"mask_function": lambda b, h, q, k: abs(q - k) <= 3, "local_size": 3}
    with pytest.raises(NotImplementedError, match="both sides"):
        make_mask(1, 4, TOKENS, allow_is_bidirectional_skip=True, **function)


# ---------------------------------------------------------------------------- other keys than asked


@pytest.mark.parametrize("padded", [False, True])
@pytest.mark.parametrize(("queries", "keys"), [(TOKENS, TOKENS + 3), (TOKENS - 2, TOKENS)])
def test_keys_that_no_mask_was_asked_for_are_refused(queries, keys, padded):
    tokens = torch.ones(2, TOKENS, dtype=torch.int64)
    tokens[0, :4] = 0
    mask = asked(True, attention_mask=tokens if padded else None)
    with pytest.raises(NotImplementedError, match=r"Layer of made_up.*eager"):
        attention_forward(Layer(is_causal=True), *heads(queries, keys), mask)


@pytest.mark.parametrize("padding", [[0, 0, 1, 1, 1, 1, 1, 1, 1], [1, 1, 1, 0, 1, 1, 1, 1, 0]])
def test_a_mask_of_one_row_is_for_every_row(padding):
    one = torch.tensor([padding])
    results = [
        attention_forward(Layer(), *heads(), asked(True, batch=rows, attention_mask=mask))[0]
        for rows, mask in ((1, one), (2, one.expand(2, -1)))
    ]
    assert torch.equal(*results)


def test_rows_that_no_mask_was_asked_for_are_refused():
    with pytest.raises(NotImplementedError, match="2 rows"):
        attention_forward(Layer(), *heads(batch=4), asked(True))


def test_a_mask_that_hides_nothing_serves_any_keys():
    inputs = heads(TOKENS, TOKENS + 3)
    assert_attends(Layer(), asked(False), visible(TOKENS, TOKENS + 3, causal=False), inputs)


def test_packed_sequences_of_other_lengths_are_refused():
    restarts = torch.tensor([[0, 1, 2, 3, 0, 1, 2, 3, 4]] * 2)
    mask = create_causal_mask(config(), torch.zeros(2, TOKENS, 32), None, None, restarts)
    attention_forward(Layer(), *heads(), mask)
    for queries, keys in ((TOKENS, TOKENS + 1), (TOKENS - 1, TOKENS - 1)):
        with pytest.raises(NotImplementedError, match="rows"):
            attention_forward(Layer(), *heads(queries, keys), mask)


# ----------------------------------------------------------------------------------------- no mask


def test_without_a_mask_nothing_is_hidden():
    """Eager attention hides nothing either."""
    for says in ({}, {"is_causal": False}):
        assert_attends(Layer(**says), None, visible(causal=False))
    assert_attends(Layer(is_causal=True), None, None, heads(queries=1))
    assert_attends(Layer(is_causal=True), None, visible(causal=False), is_causal=False)


@pytest.mark.parametrize(
    ("says", "told"),
    [({"is_causal": True}, {}), ({}, {"is_causal": True}), ({}, {"sliding_window": 3})],
)
def test_layers_that_would_hide_keys_without_a_mask_are_refused(says, told):
    with pytest.raises(NotImplementedError, match="Layer of made_up hides keys"):
        attention_forward(Layer(**says), *heads(), None, **told)


def test_positions_without_a_causal_mask_are_no_sequences():
    """Positions may be those of image patches; eager attention does not look at them."""
    places = torch.tensor([[0, 1, 2, 0, 1, 2, 0, 1, 2]] * 2)
    for mask in (None, asked(False)):
        assert_attends(Layer(), mask, visible(causal=False), position_ids=places)


# --------------------------------------------------------------- models with attention of their own


def forms(queries, keys):
    yield asked(True, queries, keys)
    yield asked(False, queries, keys)
    tokens = torch.ones(2, keys, dtype=torch.int64)
    tokens[0, -1] = 0
    yield asked(True, queries, keys, attention_mask=tokens)
    tokens[0] = tokens[0].flip(0)
    yield asked(True, queries, keys, attention_mask=tokens)
    yield make_mask(2, queries, keys, q_offset=torch.tensor(0))
    if queries == keys > 1:
        restarts = (torch.arange(keys) % 2).expand(2, -1)
        yield create_causal_mask(config(), torch.zeros(2, keys, 32), None, None, restarts)


USES = {
    "added": lambda s, m: s + m,
    "added as floats": lambda s, m: s + (1.0 - m.float()) * -1e4,
    "masked_fill": lambda s, m: s.masked_fill(m.bool(), 0.0),
    "where": lambda s, m: torch.where(m.bool(), s, 0.0),
}


@pytest.mark.parametrize("use", USES)
def test_no_mask_can_be_used_on_scores(use):
    """So that attention which a model computes by itself fails, and does not lose its mask."""
    for queries, keys in ((1, 1), (1, 2), (2, 2), (1, 3), (3, 3), (4, 4), (2, 6), (6, 6)):
        for mask in forms(queries, keys):
            for heads_of in (1, 2, 3, 4):
                scores = torch.randn(2, heads_of, queries, keys)
                with pytest.raises(RuntimeError):
                    USES[use](scores, mask) @ torch.randn(2, heads_of, keys, 8)
            with pytest.raises(RuntimeError):
                scaled_dot_product_attention(*heads(queries, keys), attn_mask=mask)


SMALL = {"vocab_size": 64, "hidden_size": 32, "num_hidden_layers": 1, "num_attention_heads": 2}


def bloom():
    return transformers.BloomConfig(vocab_size=64, hidden_size=32, n_layer=1, n_head=2)


def trocr():
    return transformers.TrOCRConfig(
        vocab_size=64, d_model=32, decoder_layers=1, decoder_attention_heads=2, decoder_ffn_dim=32
    )


REFUSED = {
    "BloomForCausalLM": bloom,
    "XGLMForCausalLM": lambda: transformers.XGLMConfig(
        vocab_size=64, d_model=32, ffn_dim=32, num_layers=1, attention_heads=2
    ),
    "TrOCRForCausalLM": trocr,
    "RoFormerForCausalLM": lambda: transformers.RoFormerConfig(**SMALL, is_decoder=True),
    "RemBertForCausalLM": lambda: transformers.RemBertConfig(**SMALL, is_decoder=True),
    "LEDModel": lambda: transformers.LEDConfig(vocab_size=64, d_model=32),
    "MvpModel": lambda: transformers.MvpConfig(vocab_size=64, d_model=32),
    "SpeechT5Model": lambda: transformers.SpeechT5Config(vocab_size=64),
    "GitModel": lambda: transformers.GitConfig(**SMALL),  # looks its layers up in a table
}


@pytest.mark.parametrize("name", REFUSED)
def test_models_that_compute_attention_by_themselves_are_refused(name):
    model_class = getattr(transformers, name)
    with pytest.raises(NotImplementedError, match=rf"{name[:4]}.*own attention.*eager"):
        model_class._from_config(REFUSED[name](), attn_implementation=NAME)


def test_they_are_refused_from_pretrained_and_when_set(tmp_path):
    model = transformers.BloomForCausalLM(bloom())
    model.save_pretrained(tmp_path)
    with pytest.raises(NotImplementedError, match="BloomForCausalLM"):
        transformers.AutoModelForCausalLM.from_pretrained(tmp_path, attn_implementation=NAME)
    model.set_attn_implementation(NAME)  # transformers warns and leaves it as it was
    assert model.config._attn_implementation != NAME


def vision_and_text(decoder):
    vision = transformers.ViTConfig(
        hidden_size=32, num_hidden_layers=1, num_attention_heads=2, intermediate_size=32,
        image_size=16, patch_size=8,
    )  # fmt: skip
    return transformers.VisionEncoderDecoderConfig.from_encoder_decoder_configs(vision, decoder)


def test_parts_of_larger_models_are_looked_at():
    composite = transformers.VisionEncoderDecoderModel
    with pytest.raises(NotImplementedError, match="TrOCR"):
        composite._from_config(vision_and_text(trocr()), attn_implementation=NAME)
    model = composite._from_config(
        vision_and_text(trocr()), attn_implementation={"encoder": NAME, "decoder": "eager"}
    )
    assert model.encoder.config._attn_implementation == NAME
    assert model.decoder.config._attn_implementation == "eager"


class Pooling(torch.nn.Module):
    """A user's own, beside a model of transformers whose attention it does not touch."""


Pooling.__name__ = "AttentionPooling"


class Classifier(transformers.LlamaModel):
    def __init__(self, config):
        super().__init__(config)
        self.pooling = Pooling()
        self.post_init()


def test_attention_in_files_of_users_is_theirs():
    small = transformers.LlamaConfig(**SMALL, intermediate_size=32)
    model = Classifier._from_config(small, attn_implementation=NAME, dtype=torch.bfloat16)
    assert model.config._attn_implementation == NAME


def test_attention_beside_layers_that_ask_is_looked_at():
    """BigBirdPegasus's encoder masks scores of its own, its decoder calls the interface."""
    small = transformers.BigBirdPegasusConfig(
        vocab_size=64, d_model=32, encoder_layers=1, decoder_layers=1, encoder_attention_heads=2,
        decoder_attention_heads=2, encoder_ffn_dim=32, decoder_ffn_dim=32,
    )  # fmt: skip
    with pytest.raises(NotImplementedError, match="BigBirdPegasusEncoder"):
        transformers.BigBirdPegasusModel._from_config(small, attn_implementation=NAME)
    transformers.BigBirdPegasusForCausalLM._from_config(small, attn_implementation=NAME)
