"""Tiny random models of Hugging Face transformers on these kernels, against its own attention.

What is right is the same model in float32; what is near enough is as far from that as
transformers' own attention in the same dtype is, times two.
"""

from __future__ import annotations

import copy
import os
from types import SimpleNamespace

os.environ.setdefault("HF_HUB_OFFLINE", "1")

import pytest
import torch

from hopper_attention import simulator

transformers = pytest.importorskip("transformers")

from hopper_attention.integrations import transformers_masks  # noqa: E402
from hopper_attention.integrations.transformers import NAME, attention_forward, make_mask, register  # noqa: E402

register()
SMALL = {
    "vocab_size": 97,
    "hidden_size": 64,
    "intermediate_size": 96,
    "num_hidden_layers": 2,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "head_dim": 16,
    "max_position_embeddings": 128,
    "initializer_range": 0.2,
    "pad_token_id": 0,
    "bos_token_id": None,
    "eos_token_id": None,
}
WINDOW = 5
ALTERNATING = ["sliding_attention", "full_attention"]


def llama(**changes):
    return transformers.LlamaConfig(**{**SMALL, **changes})


def mistral(**changes):
    return transformers.MistralConfig(**{**SMALL, "sliding_window": WINDOW, **changes})


def gemma2(**changes):
    own = {
        "sliding_window": WINDOW,
        "attn_logit_softcapping": 2.0,
        "query_pre_attn_scalar": 4,
        "layer_types": ALTERNATING,
    }
    return transformers.Gemma2Config(**{**SMALL, **own, **changes})


def gpt_oss(**changes):
    own = {
        "sliding_window": WINDOW,
        "layer_types": ALTERNATING,
        "num_local_experts": 2,
        "num_experts_per_tok": 2,  # all of them: no choice that rounding could change
    }
    return transformers.GptOssConfig(**{**SMALL, **own, **changes})


@pytest.fixture(autouse=True)
def one_thread():
    """Tensors this small are thirty times slower on the threads of a busy host."""
    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(threads)


CONFIGS = {"llama": llama, "mistral": mistral, "gemma2": gemma2, "gpt_oss": gpt_oss}
models = pytest.mark.parametrize("name", CONFIGS)


def model_of(config, dtype=torch.bfloat16):
    torch.manual_seed(0)
    model = transformers.AutoModelForCausalLM.from_config(config).to(dtype).eval()
    for parameter_name, parameter in model.named_parameters():
        if parameter_name.endswith("sinks"):
            torch.nn.init.uniform_(parameter, 0.0, 3.0)
    model.generation_config.eos_token_id = None
    return model


def on(model, attention):
    other = copy.deepcopy(model)
    other.set_attn_implementation(attention)
    return other


def exact(model):
    return on(model, "eager").float()


def tokens(batch, length, seed=1):
    generator = torch.Generator().manual_seed(seed)
    return torch.randint(1, 97, (batch, length), generator=generator)


def logits(model, *, use_cache=False, **inputs):
    return model(**inputs, use_cache=use_cache).logits


def error(result, expected):
    """The worst row's error counts."""
    return (result.float() - expected.float()).norm(dim=-1).max().item()


def assert_as_near(ours, peer, right):
    assert torch.isfinite(ours).all()
    floor = 1e-4 * right.float().norm(dim=-1).max().item()
    assert error(ours, right) <= 2 * error(peer, right) + floor


MASKS = {
    "none": None,
    "left": [[0] * 4 + [1] * 8, [1] * 12, [0] * 9 + [1] * 3],
    "right": [[1] * 8 + [0] * 4, [1] * 12, [1] * 3 + [0] * 9],
    "both": [[0] * 2 + [1] * 7 + [0] * 3, [0] * 4 + [1] * 8, [1] * 5 + [0] * 7],
}
HOLES = [[1, 0, 1, 1, 0, 0, 1, 1, 1, 1, 0, 1], [0, 1, 1, 1, 0, 1, 1, 1, 1, 1, 1, 0], [1] * 12]


def batch_of(mask):
    inputs = {"input_ids": tokens(3, 12)}
    if mask is None:
        return inputs, torch.ones(3, 12, dtype=torch.bool)
    mask = torch.tensor(mask)
    return {**inputs, "attention_mask": mask, "position_ids": positions(mask)}, mask.bool()


def positions(mask):
    return (mask.cumsum(-1) - 1).clamp(min=0)


@models
@pytest.mark.parametrize("kind", MASKS)
def test_logits_and_gradients(name, kind):
    model = model_of(CONFIGS[name]())
    inputs, valid = batch_of(MASKS[kind])
    results = {}
    for which, m in {
        "right": exact(model),
        "peer": on(model, "eager"),
        "ours": on(model, NAME),
    }.items():
        out = logits(m, **inputs)
        torch.manual_seed(2)
        direction = torch.randn(out.shape) * valid[:, :, None]
        (out.float() * direction).sum().backward()
        gradients = {n: p.grad for n, p in m.named_parameters() if p.grad is not None}
        results[which] = (out.detach(), gradients)
    (right, d_right), (peer, d_peer), (ours, d_ours) = (
        results[which] for which in ("right", "peer", "ours")
    )
    assert_as_near(ours[valid], peer[valid], right[valid])
    assert d_ours.keys() == d_right.keys()
    for parameter in (n for n, d in d_right.items() if d.numel() > 16):  # fewer: luck of rounding
        assert_as_near(*(d[parameter].flatten() for d in (d_ours, d_peer, d_right)))


@models
def test_holes_are_as_if_they_were_not_there(name):
    """Windows count tokens that count, so that each row equals its tokens alone."""
    model = on(model_of(CONFIGS[name]()), NAME)
    inputs, valid = batch_of(HOLES)
    out = logits(model, **inputs)
    for row, mask, result in zip(inputs["input_ids"], valid, out):
        alone = logits(model, input_ids=row[mask][None])
        torch.testing.assert_close(result[mask], alone[0], rtol=0, atol=0.0)


def test_holes_without_windows_are_sdpas():
    model = model_of(llama())
    inputs, valid = batch_of(HOLES)
    ours, peer, right = on(model, NAME), on(model, "sdpa"), exact(model)
    assert_as_near(*(logits(m, **inputs)[valid] for m in (ours, peer, right)))


LENGTHS = (5, 1, 1, 9, 2)


def packed_inputs(kind):
    ids = tokens(1, sum(LENGTHS))
    restart = torch.cat([torch.arange(n) for n in LENGTHS])[None]
    if kind == "position_ids":
        return {"input_ids": ids, "position_ids": restart}
    collator = transformers.DataCollatorWithFlattening(
        return_flash_attn_kwargs=True, return_position_ids=True, return_tensors="pt"
    )
    pieces = [{"input_ids": piece.tolist()} for piece in ids[0].split(LENGTHS)]
    batch = collator(pieces)
    batch.pop("labels")
    assert "cu_seq_lens_q" in batch
    return batch


@models
@pytest.mark.parametrize("use_cache", [False, True])
@pytest.mark.parametrize("kind", ["position_ids", "cu_seq_lens"])
def test_packed_sequences_are_as_alone(name, kind, use_cache):
    model = on(model_of(CONFIGS[name]()), NAME)
    inputs = packed_inputs(kind)
    with torch.no_grad():
        out = logits(model, **inputs, use_cache=use_cache)
        pieces = inputs["input_ids"][0].split(LENGTHS)
        alone = [logits(model, input_ids=piece[None])[0] for piece in pieces]
    torch.testing.assert_close(out[0], torch.cat(alone), rtol=0, atol=0)


def test_packed_sequences_of_a_model_that_keeps_its_positions():
    """GPT-BigCode's layers are not told position_ids; transformers' masks know."""
    config = transformers.GPTBigCodeConfig(
        vocab_size=97, n_positions=64, n_embd=64, n_layer=2, n_head=4, initializer_range=0.2,
        attn_pdrop=0.0, bos_token_id=None, eos_token_id=None, pad_token_id=0,
    )  # fmt: skip
    model = on(model_of(config), NAME)
    inputs = packed_inputs("position_ids")
    out = logits(model, **inputs)[0]
    pieces = inputs["input_ids"][0].split(LENGTHS)
    alone = [logits(model, input_ids=piece[None])[0] for piece in pieces]
    torch.testing.assert_close(out, torch.cat(alone), rtol=0, atol=0)


def test_rows_that_are_packed_differently():
    model = on(model_of(llama()), NAME)
    ids = tokens(2, 9)
    restart = torch.tensor([[*range(4), *range(5)], [*range(2), *range(7)]])
    out = logits(model, input_ids=ids, position_ids=restart)
    for row, first in enumerate((4, 2)):
        for part in (slice(0, first), slice(first, 9)):
            alone = logits(model, input_ids=ids[row : row + 1, part])
            torch.testing.assert_close(out[row : row + 1, part], alone, rtol=0, atol=0)


def test_positions_changed_in_place_are_looked_at_again():
    model = on(model_of(llama()), NAME)
    ids, positions = tokens(1, 8), torch.arange(8)[None]
    whole = logits(model, input_ids=ids, position_ids=positions)
    positions[0, 4:] -= 4
    packed = logits(model, input_ids=ids, position_ids=positions)
    assert not torch.equal(whole[0, 4:], packed[0, 4:])
    alone = logits(model, input_ids=ids[:, 4:])
    torch.testing.assert_close(packed[:, 4:], alone, rtol=0, atol=0)


@models
@pytest.mark.parametrize("cache", ["dynamic", "static"])
@pytest.mark.parametrize("padding", ["left", "none"])
def test_generate(name, cache, padding):
    """Greedy: the same tokens as transformers' own, also when a window has left its cache."""
    model = model_of(CONFIGS[name](), torch.float16)  # fewer ties that rounding breaks
    prompts = tokens(2, 7)
    mask = torch.ones_like(prompts)
    if padding == "left":
        mask[0, :4] = 0
        prompts[0, :4] = 0
    settings = {"max_new_tokens": 9, "do_sample": False, "attention_mask": mask}
    expected = on(model, "eager").generate(prompts, **settings)
    result = on(model, NAME).generate(prompts, **settings, cache_implementation=cache)
    assert torch.equal(result, expected)


@pytest.mark.parametrize("name", ["llama", "gemma2"])
@pytest.mark.parametrize("mask", ["right", "both", "none"])
def test_static_cache_in_pieces(name, mask):
    """Padding anywhere, several queries a step, slots that nobody has written."""
    model = on(model_of(CONFIGS[name](sliding_window=32)), NAME)
    inputs, valid = batch_of(MASKS[mask])
    whole = logits(model, **inputs)
    cache = transformers.StaticCache(config=model.config, max_cache_len=20)
    masks = inputs.get("attention_mask")
    places = inputs.get("position_ids", torch.arange(12).expand(3, -1))
    results = []
    for first, last in ((0, 5), (5, 6), (6, 10), (10, 12)):
        for layer in cache.layers:
            if layer.is_initialized:  # unwritten slots may hold anything
                layer.keys[:, :, first:] = torch.nan
                layer.values[:, :, first:] = torch.nan
        out = model(
            input_ids=inputs["input_ids"][:, first:last],
            attention_mask=None if masks is None else masks[:, :last],
            position_ids=places[:, first:last],
            past_key_values=cache,
            use_cache=True,
        )
        results.append(out.logits)
    torch.testing.assert_close(torch.cat(results, 1)[valid], whole[valid], rtol=0, atol=0.05)


# ------------------------------------------------------------- encoders, cross attention, chunks


def compare(make, inputs, valid, *, peer="sdpa", output="last_hidden_state"):
    """ours against peer for a model that is no causal language model."""
    torch.manual_seed(0)
    model = make().to(torch.bfloat16).eval()
    results = []
    for m in (on(model, NAME), on(model, peer), exact(model)):
        out = m(**inputs)[output]
        (out.float() ** 3 * valid[:, :, None]).sum().backward()
        gradient = torch.cat([p.grad.flatten() for p in m.parameters() if p.grad is not None])
        results.append((out.detach()[valid], gradient))
    outs, gradients = zip(*results)
    assert_as_near(*outs)
    assert_as_near(*gradients)


@pytest.mark.parametrize("mask", [MASKS["right"], MASKS["left"], HOLES, None])
def test_encoder(mask):
    config = transformers.BertConfig(**SMALL, attention_probs_dropout_prob=0.0)
    inputs, valid = batch_of(mask)
    compare(lambda: transformers.BertModel(config, add_pooling_layer=False), inputs, valid)


@pytest.mark.parametrize("mask", ["right", "left", "none"])
def test_encoder_with_windows_on_both_sides(mask):
    config = transformers.ModernBertConfig(**SMALL, local_attention=6, layer_types=ALTERNATING)
    inputs, valid = batch_of(MASKS[mask])
    compare(lambda: transformers.ModernBertModel(config), inputs, valid)


@pytest.mark.parametrize("length", [12, 5])
def test_cross_attention(length):
    """The encoder's padding hides keys of the decoder's queries, also where there are as many."""
    config = transformers.BartConfig(
        vocab_size=97, d_model=64, encoder_layers=1, decoder_layers=2, max_position_embeddings=64,
        encoder_attention_heads=4, decoder_attention_heads=4, encoder_ffn_dim=96,
        decoder_ffn_dim=96, dropout=0.0, init_std=0.2,
    )  # fmt: skip
    inputs, _ = batch_of(HOLES)
    inputs.pop("position_ids")
    inputs["decoder_input_ids"] = tokens(3, length, seed=3)
    compare(lambda: transformers.BartModel(config), inputs, torch.ones(3, length, dtype=torch.bool))


@pytest.mark.parametrize("mask", ["left", "right", "none"])
def test_attention_chunks(mask):
    config = transformers.Llama4TextConfig(
        **SMALL, intermediate_size_mlp=96, num_local_experts=1, attention_chunk_size=4,
        layer_types=["chunked_attention", "full_attention"], moe_layers=[],
    )  # fmt: skip
    inputs, valid = batch_of(MASKS[mask])
    compare(lambda: transformers.Llama4TextModel(config), inputs, valid)
    torch.manual_seed(0)
    model = on(transformers.Llama4ForCausalLM(config).to(torch.bfloat16).eval(), NAME)
    with pytest.raises(NotImplementedError, match="attention_chunk_size=4"):
        model.generate(tokens(1, 9), max_new_tokens=3, do_sample=False)


# ------------------------------------------------------------------------- training, compilation


@pytest.mark.parametrize("use_reentrant", [False, True])
@pytest.mark.parametrize("kind", ["left", "packed"])
def test_gradient_checkpointing(kind, use_reentrant):
    inputs = packed_inputs("position_ids") if kind == "packed" else batch_of(MASKS[kind])[0]
    gradients = []
    for checkpointing in (False, True):
        model = on(model_of(gpt_oss()), NAME).train()
        if checkpointing:
            model.gradient_checkpointing_enable({"use_reentrant": use_reentrant})
        logits(model, **inputs).float().square().mean().backward()
        gradients.append([p.grad for p in model.parameters() if p.grad is not None])
    assert len(gradients[0]) == len(gradients[1])
    assert all(torch.equal(a, b) for a, b in zip(*gradients))


def compiled_inputs(kind):
    if kind == "cu_seq_lens":
        return packed_inputs(kind)
    return batch_of(MASKS[kind])[0]


@pytest.mark.parametrize(
    ("kind", "backend"),
    [
        ("none", "aot_eager"),
        ("left", "aot_eager"),
        ("cu_seq_lens", "aot_eager"),
        ("left", "inductor"),
    ],
)
def test_compiles_without_graph_breaks(kind, backend):
    model = on(model_of(mistral(num_hidden_layers=1)), NAME)
    inputs = compiled_inputs(kind)
    torch._dynamo.reset()
    results = []
    for forward in (model, torch.compile(model, backend=backend, fullgraph=True)):
        model.zero_grad()
        out = forward(**inputs, use_cache=False).logits
        out.float().square().mean().backward()
        results.append((out.detach(), model.model.layers[0].self_attn.k_proj.weight.grad))
    for eager, compiled in zip(*results):
        torch.testing.assert_close(compiled, eager, rtol=0.05, atol=0.05 * eager.abs().max().item())


def test_a_graph_of_patterns_that_were_not_asked_for_before(monkeypatch):
    """The table grows between layers, as in a new process whose first call is compiled."""
    monkeypatch.setattr(transformers_masks, "_codes", transformers_masks._codes[:2])
    module, inputs = layer(causal=False), heads(1, 8)

    def layers():
        results = []
        for window in (3, 5, 3):
            mask = make_mask(1, 8, 8, allow_is_bidirectional_skip=True, local_size=window)
            results.append(attention_forward(module, *inputs, mask)[0])
        return torch.stack(results)

    torch._dynamo.reset()
    compiled = torch.compile(layers, backend="aot_eager", fullgraph=True)
    first = compiled()
    assert torch.equal(first, layers())
    make_mask(1, 8, 8, local_size=7)  # of another model
    with torch.compiler.set_stance("fail_on_recompile"):
        assert torch.equal(first, compiled())


@pytest.mark.parametrize("padding", ["left", "none"])
@pytest.mark.parametrize("ahead", [True, False], ids=["mask made ahead", "mask made in the graph"])
def test_a_step_with_a_static_cache_compiles(ahead, padding):
    """`generate` makes the masks ahead; other loops leave that to the graph."""
    from transformers.masking_utils import create_masks_for_generate

    model = on(model_of(gemma2()), NAME)
    ids, mask = tokens(2, 10), torch.ones(2, 10, dtype=torch.int64)
    mask[0, : 3 if padding == "left" else 0] = 0
    torch._dynamo.reset()
    compiled = torch.compile(model, backend="aot_eager", fullgraph=True)
    results = []
    for forward in (model, compiled):
        cache, outs = transformers.StaticCache(config=model.config, max_cache_len=12), []
        for first, last in ((0, 6), (6, 7), (7, 8), (8, 9), (9, 10)):
            step = {"input_ids": ids[:, first:last], "past_key_values": cache, "use_cache": True}
            step["position_ids"] = positions(mask)[:, first:last]
            step["attention_mask"] = mask[:, :last]
            if ahead:
                embeds = torch.empty(2, last - first, 0, dtype=torch.bfloat16)
                step["attention_mask"] = create_masks_for_generate(
                    model.config, embeds, mask[:, :last], cache, step["position_ids"]
                )
            with torch.no_grad():  # a prefill is not compiled
                outs.append((model if first == 0 else forward)(**step).logits)
        results.append(torch.cat(outs, 1)[mask.bool()])
    torch.testing.assert_close(*results, rtol=0, atol=0.05)


@pytest.mark.parametrize("masked", [False, True])
def test_positions_that_restart_in_a_graph_are_refused(masked):
    """Packing would have to be looked for; and ignored, it would give wrong numbers.

    So with a mask of ones, too: an eager call sees that it hides nothing.
    """
    model = on(model_of(llama(num_hidden_layers=1)), NAME)
    torch._dynamo.reset()
    forward = torch.compile(model, backend="aot_eager", fullgraph=True)
    inputs = packed_inputs("position_ids")
    if masked:
        inputs["attention_mask"] = torch.ones_like(inputs["input_ids"])
    with torch.no_grad(), pytest.raises(RuntimeError, match="cu_seq_lens_q"):
        forward(**inputs, use_cache=False)


# ------------------------------------------------------------------------------ dtypes, refusals


def test_autocast_is_computed_in_its_dtype():
    model = model_of(llama(), torch.float32)
    inputs, valid = batch_of(MASKS["left"])
    right = logits(on(model, "eager"), **inputs)
    with torch.autocast("cpu", torch.bfloat16):
        peer, ours = logits(on(model, "eager"), **inputs), logits(on(model, NAME), **inputs)
    assert_as_near(ours[valid], peer[valid], right[valid])


def test_a_model_in_float32_is_refused():
    with pytest.raises(NotImplementedError, match=r"torch\.float32.*bfloat16"):
        logits(on(model_of(llama(), torch.float32), NAME), input_ids=tokens(1, 4))


def test_dropout_is_refused_in_training_only():
    model = on(model_of(llama(attention_dropout=0.1)), NAME)
    logits(model, input_ids=tokens(1, 4))
    with pytest.raises(NotImplementedError, match=r"dropout=0\.1"):
        logits(model.train(), input_ids=tokens(1, 4))


def layer(causal=True):
    return SimpleNamespace(is_causal=causal, config=SimpleNamespace())


def heads(batch=1, seqlen=4):
    return [torch.randn(batch, 2, seqlen, 16, dtype=torch.bfloat16) for _ in range(3)]


def causal(batch=1, queries=4, keys=4, **more):
    return make_mask(batch, queries, keys, **more)


def bidirectional(batch=1, queries=4, keys=4, **more):
    return make_mask(batch, queries, keys, allow_is_bidirectional_skip=True, **more)


@pytest.mark.parametrize(
    "argument",
    [
        {"position_bias": torch.zeros(1, 2, 4, 4)},
        {"output_attentions": True},
        {"cache": object()},
        {"block_table": torch.zeros(1, 1)},
        {"indices": torch.zeros(1, 4, 2)},
    ],
    ids=lambda a: next(iter(a)),
)
def test_arguments_that_change_the_result_are_refused(argument):
    with pytest.raises(NotImplementedError, match=next(iter(argument))):
        attention_forward(layer(), *heads(), None, **argument)


def test_other_arguments_pass():
    inputs = heads()
    out, weights = attention_forward(
        layer(), *inputs, causal(), use_cache=True, output_attentions=False, cache_position=None,
        num_items_in_batch=3, position_bias=None,
    )  # fmt: skip
    assert weights is None and out.shape == (1, 4, 2, 16)
    assert torch.equal(out, attention_forward(layer(), *inputs, causal())[0])


@pytest.mark.parametrize(
    "mask", [torch.ones(1, 1, 4, 4), torch.ones(1, 1, 1, 4), torch.ones(1, 9), torch.ones(1, 2)]
)
def test_masks_of_other_shapes_are_refused(mask):
    with pytest.raises(NotImplementedError, match="attention_mask of shape"):
        attention_forward(layer(), *heads(), mask)


def test_both_mask_and_packing_are_refused():
    offsets = torch.tensor([0, 4])
    mask = torch.ones(1, 4, dtype=torch.bool)
    with pytest.raises(ValueError, match="cu_seq_lens_q"):
        attention_forward(layer(), *heads(), mask, cu_seq_lens_q=offsets, cu_seq_lens_k=offsets)


@pytest.mark.parametrize("packed", [False, True], ids=["one sequence", "packed"])
@pytest.mark.parametrize("added", ["or_mask_function", "and_mask_function", "block_sequence_ids"])
def test_added_patterns_are_refused(added, packed):
    values = {
        "or_mask_function": lambda b, h, q, k: k == 0,
        "and_mask_function": lambda b, h, q, k: k != 0,
        "block_sequence_ids": torch.tensor([[-1, 0, 0, -1]]),
    }
    more = {"position_ids": torch.tensor([[0, 1, 2, 0]])} if packed else {}
    with pytest.raises(NotImplementedError, match="adds to its mask"):
        mask_of_llama(**{added: values[added]}, **more)


def mask_of_llama(config=None, **more):
    from transformers.masking_utils import create_causal_mask

    config = config or llama()
    config._attn_implementation = NAME
    return create_causal_mask(config, torch.zeros(1, 4, 8), None, None, **more)


def test_added_blocks_are_refused_in_a_graph():
    """There transformers combines them with what may be packed, under one name."""
    groups, places = torch.tensor([[-1, 0, 0, -1]]), torch.arange(4)[None]
    torch._dynamo.reset()
    make = torch.compile(mask_of_llama, backend="aot_eager", fullgraph=True)
    with pytest.raises((RuntimeError, NotImplementedError), match="adds to its mask"):
        make(llama(), block_sequence_ids=groups, position_ids=places)
    make(llama(), position_ids=places)


def test_a_mask_that_came_as_it_was():
    """Models that make no mask pass on the given one: transformers' flash convention."""
    q, k, v = heads(2, 6)
    mask = torch.tensor([[0, 0, 1, 1, 1, 1], [1, 1, 1, 1, 1, 1]])
    for first in (0, 3, 5):
        queries = q[:, :, first:]
        out, _ = attention_forward(layer(), queries, k, v, mask)
        made = make_mask(2, 6 - first, 6, q_offset=first, attention_mask=mask)
        assert torch.equal(out, attention_forward(layer(), queries, k, v, made)[0])
        alone = attention_forward(
            layer(),
            *(queries[:1, :, max(2 - first, 0) :], k[:1, :, 2:], v[:1, :, 2:]),
            causal(1, min(6 - first, 4), 4, q_offset=max(first - 2, 0)),
        )
        assert torch.equal(out[:1, max(2 - first, 0) :], alone[0])


def form(mask):
    return mask.dtype, mask.shape[2], mask.shape[3]


def used(mask):
    return mask.view(torch.int32)[:, 0, :, 0].tolist()


def test_masks_that_need_no_gather_say_so():
    prefix = torch.tensor([[1, 1, 1, 0], [1, 1, 1, 1]])
    assert form(make_mask(2, 4, 4, attention_mask=torch.ones(2, 4))) == (torch.uint32, 1, 8)
    assert form(make_mask(2, 4, 4)) == (torch.uint32, 1, 8)
    assert form(make_mask(2, 4, 4, attention_mask=prefix)) == (torch.uint32, 2, 8)
    assert used(make_mask(2, 4, 4, attention_mask=prefix)) == [[3, 3], [4, 4]]
    assert form(make_mask(2, 4, 4, attention_mask=prefix.flip(1))) == (torch.uint64, 3, 8)
    for mask in (
        None,
        torch.ones(2, 5),
        torch.ones(2, 9),
    ):  # the last says nothing of what is written
        static = make_mask(2, 1, 9, q_offset=torch.tensor(4), attention_mask=mask)
        assert form(static) == (torch.uint32, 2, 10)
        assert used(static) == [[1, 5]] * 2


def test_registering_again_changes_nothing():
    before = transformers.AttentionInterface()[NAME]
    register()
    assert transformers.AttentionInterface()[NAME] is before is attention_forward


def test_importing_does_not_import_transformers():
    import subprocess
    import sys

    program = (
        "import sys, hopper_attention.integrations.transformers as t;"
        "sys.exit('transformers' in sys.modules)"
    )
    assert subprocess.run([sys.executable, "-c", program], check=False).returncode == 0


@pytest.mark.simulator
@pytest.mark.parametrize("kind", ["left", "packed"])
def test_on_the_kernels(kind):
    """The compiled kernels, forward and backward."""
    model = model_of(gpt_oss(head_dim=64))
    inputs, valid = batch_of(MASKS["left"])
    if kind == "packed":
        inputs = packed_inputs("position_ids")

    def run(m, apart):
        if kind == "left":
            out = logits(m, **inputs)[valid]
        elif apart:
            pieces = inputs["input_ids"][0].split(LENGTHS)
            out = torch.cat([logits(m, input_ids=piece[None])[0] for piece in pieces])
        else:
            out = logits(m, **inputs)[0]
        out.float().square().mean().backward()
        gradients = [x.self_attn.q_proj.weight.grad.flatten() for x in m.model.layers]
        return out.detach(), torch.cat(gradients)

    with simulator.enabled(seed=1):
        ours = run(on(model, NAME), False)
    for results in zip(ours, run(on(model, "eager"), True), run(exact(model), True)):
        assert_as_near(*results)
