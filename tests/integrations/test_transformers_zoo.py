"""A sample of `make zoo`: model classes of every kind, right against eager or refused."""

from __future__ import annotations

import time

import pytest
import torch

transformers = pytest.importorskip("transformers")

from zoo import outcomes  # noqa: E402
from zoo.configs import WINDOW, tiny  # noqa: E402
from zoo.inputs import Inputs  # noqa: E402
from zoo.outcomes import PARTLY, REFUSED, RIGHT, look_at  # noqa: E402

from hopper_attention.integrations import transformers as integration  # noqa: E402
from hopper_attention.integrations.transformers import register  # noqa: E402

register()

CASES = {
    # The mask was lost: these do not call the attention interface.
    "BloomForCausalLM": REFUSED,
    "XGLMForCausalLM": REFUSED,
    "TrOCRForCausalLM": REFUSED,
    "RoFormerForCausalLM": REFUSED,
    "RemBertForCausalLM": REFUSED,
    "LEDModel": REFUSED,
    "MvpModel": REFUSED,
    "SpeechT5Model": REFUSED,
    # Became causal: these do not say what they are.
    "AlignTextModel": RIGHT,
    "ClapTextModel": RIGHT,
    "SplinterModel": RIGHT,
    "MllamaForCausalLM": RIGHT,
    # Lost causality: these say that they are not.
    "BigBirdPegasusForCausalLM": RIGHT,
    "BigBirdPegasusModel": REFUSED,
    "NllbMoeModel": RIGHT,
    # Other keys, windows wider by one, windows that nobody tells.
    "DeepseekV4ForCausalLM": REFUSED,
    "T5GemmaModel": RIGHT,
    "PhimoeForCausalLM": RIGHT,
    # Of what is common.
    "LlamaForCausalLM": RIGHT,
    "MistralForCausalLM": RIGHT,
    "Gemma3ForCausalLM": RIGHT,
    "GptOssForCausalLM": RIGHT,
    "Llama4ForCausalLM": PARTLY,
    "Qwen3NextForCausalLM": RIGHT,
    "ModernBertModel": RIGHT,
    "BertForSequenceClassification": RIGHT,
    "BartForConditionalGeneration": RIGHT,
    "T5Model": REFUSED,
    "CLIPModel": RIGHT,
    "ViTModel": RIGHT,
}


@pytest.mark.parametrize("name", CASES)
def test_right_or_refused(name):
    outcome = look_at(getattr(transformers, name))
    assert (outcome.kind, "insensitive" in outcome.detail) == (CASES[name], False), outcome


def test_refusals_name_what_to_use_instead():
    for name in ("BloomForCausalLM", "DeepseekV4ForCausalLM", "T5Model"):
        assert "eager" in look_at(getattr(transformers, name)).detail


@pytest.mark.parametrize(
    ("name", "fault"),
    [
        ("LlamaForCausalLM", {"causal": False}),
        ("BertModel", {"causal": True}),
        ("MistralForCausalLM", {"window": (-1, -1)}),
        ("MistralForCausalLM", {"window": (WINDOW, 0)}),
        ("T5GemmaModel", {"window": (WINDOW - 1, WINDOW - 1)}),
    ],
    ids=str,
)
def test_the_zoo_sees_wrong_patterns(name, fault, monkeypatch):
    """A window that is one key wider, for instance."""
    read = integration.read

    def misread(*arguments):
        made = read(*arguments)
        if "window" in fault and made.pattern.window == (-1, -1):
            return made
        return made._replace(pattern=made.pattern._replace(**fault))

    monkeypatch.setattr(integration, "read", misread)
    assert look_at(getattr(transformers, name)).kind == outcomes.WRONG


@pytest.fixture
def nothing_is_refused(monkeypatch):
    """When it is built."""
    for look in ("_own_attention", "_own_scores"):
        monkeypatch.setattr(integration, look, lambda model: None)


def test_the_zoo_sees_a_mask_that_is_lost(monkeypatch, nothing_is_refused):
    masks = transformers.masking_utils.AttentionMaskInterface()
    monkeypatch.setitem(masks._global_mapping, outcomes.NAME, lambda *a, **k: None)
    for name in ("BloomForCausalLM", "RoFormerForCausalLM", "TrOCRForCausalLM"):
        assert look_at(getattr(transformers, name)).kind == outcomes.WRONG


def test_a_model_that_was_not_refused_fails_rather_than_lose_its_mask(nothing_is_refused):
    for name in ("BloomForCausalLM", "RoFormerForCausalLM", "TrOCRForCausalLM"):
        config = tiny(getattr(transformers, name).config_class)
        model = getattr(transformers, name)._from_config(
            config, attn_implementation=outcomes.NAME, dtype=torch.bfloat16
        )
        with pytest.raises((RuntimeError, ValueError)):  # a shape that does not fit
            model(**Inputs(model).values)


def test_the_zoo_sees_a_registration_that_fails(monkeypatch):
    """An error that is no refusal of ours is wrong where eager attention can be built."""

    def broken(model):
        raise KeyError("hopper_attention")

    monkeypatch.setattr(integration, "_own_attention", broken)
    assert look_at(transformers.LlamaForCausalLM).kind == outcomes.WRONG


def test_the_zoo_sees_a_run_that_does_not_end(monkeypatch):
    def never(*arguments, **options):
        time.sleep(600)

    monkeypatch.setattr(outcomes, "HANGS", 1.0)
    monkeypatch.setattr(integration, "flash_attn_func", never)
    assert look_at(transformers.LlamaForCausalLM, seconds=20).kind == outcomes.WRONG
