"""A model's forward gets small tensors by the names of its parameters."""

from __future__ import annotations

import inspect
from typing import Any

import torch
from torch import Tensor

from zoo.configs import LENGTH

BATCH = 3
USED = 96
"""Tokens of inputs are 3 .. USED: special ones are before and after."""

PADDED = torch.tensor([[0] * 4 + [1] * 8, [1] * 12, [1] * 8 + [0] * 4])
LEFT = torch.tensor([[0] * 4 + [1] * 8, [1] * 12, [0] * 2 + [1] * 10])
ONES = torch.ones_like(PADDED)


class Inputs:
    """Arguments of one class's forward; floats in float32."""

    def __init__(self, model: torch.nn.Module, more: set[str] | frozenset[str] = frozenset()):
        self.more = more
        self.choices = type(model).__name__.endswith("ForMultipleChoice")
        self.parameters = inspect.signature(model.forward).parameters
        self.config = model.config
        self.text_config = model.config.get_text_config(decoder=True)
        self.main = getattr(model, "main_input_name", "input_ids")
        self.random = torch.Generator().manual_seed(1)
        self.values: dict[str, Any] = {}
        for name, parameter in self.parameters.items():
            required = parameter.default is parameter.empty and parameter.kind in (
                parameter.POSITIONAL_OR_KEYWORD,
                parameter.KEYWORD_ONLY,
            )
            if required or name == self.main or name in self.wanted():
                self.values[name] = self.make(name)
        self.values = {name: x for name, x in self.values.items() if x is not None}

    def wanted(self) -> set[str]:
        if self.more:
            return {self.main, "input_ids", "bbox", "decoder_input_ids"} & set(self.parameters) | (
                self.more & set(self.parameters)
            )
        if self.main == "input_ids":
            wanted = {"input_ids", "bbox"}
            if getattr(self.config, "is_encoder_decoder", False):
                wanted.add("decoder_input_ids")
            if getattr(self.config, "model_type", "") in ("clip", "siglip", "clap", "align"):
                wanted |= {"pixel_values", "input_features"}
            return wanted
        if getattr(self.config, "is_encoder_decoder", False):
            return {"decoder_input_ids"}
        return {"input_ids"} if "input_ids" in self.parameters else set()

    @property
    def text(self) -> bool:
        return isinstance(self.values.get("input_ids"), Tensor)

    @property
    def masked(self) -> bool:
        """The model takes a padding mask of its tokens."""
        ids = self.values.get("input_ids")
        return self.text and ids.ndim == 2 and "attention_mask" in self.parameters

    def padded(self, mask: Tensor) -> dict[str, Tensor]:
        """Arguments for a padded batch: the token of the end is the last one that counts."""
        ids = self.values["input_ids"].clone()
        end, pad = (getattr(self.text_config, n, None) for n in ("eos_token_id", "pad_token_id"))
        if isinstance(end, int):
            last = (torch.arange(mask.shape[1]) * mask).argmax(-1)
            ids[torch.arange(BATCH), last] = end
        ids = torch.where(mask.bool(), ids, pad if isinstance(pad, int) else 1)
        return {"input_ids": ids, "attention_mask": mask}

    def make(self, name: str) -> Tensor | None:
        maker = getattr(self, "make_" + name, None)
        if maker is not None:
            return maker()
        if name.endswith("input_ids"):
            return self.ids()
        if name.endswith("_mask"):
            return None
        if "pixel_values" in name or name == "images":
            return self.make_pixel_values()
        raise LookupError(f"no rule for the argument {name}")

    def ids(self, length: int = LENGTH) -> Tensor:
        ids = torch.randint(3, USED, (BATCH, length), generator=self.random)
        if isinstance(end := getattr(self.text_config, "eos_token_id", None), int):
            ids[:, -1] = end  # where some classes read their result
        return ids[:, None].repeat(1, 2, 1) if self.choices else ids

    def number(self, *names: str, default: int) -> int:
        parts = [self.config]
        for part in (
            "vision_config",
            "audio_config",
            "backbone_config",
            "encoder",
            "encoder_config",
        ):
            if getattr(self.config, part, None) is not None:
                parts.append(getattr(self.config, part))
        for part in parts:
            for name in names:
                value = getattr(part, name, None)
                if isinstance(value, (list, tuple)) and value and isinstance(value[0], int):
                    value = value[0]
                if isinstance(value, int) and not isinstance(value, bool):
                    return value
        return default

    def floats(self, *shape: int) -> Tensor:
        return torch.randn(*shape, generator=self.random)

    def make_grid_thw(self) -> Tensor:
        return torch.tensor([[1, 4, 4]] * BATCH)

    make_image_grid_thw = make_grid_thw

    def patches(self) -> Tensor:
        """Patches of the images of make_grid_thw follow one another."""
        side = self.number("patch_size", default=8)
        deep = self.number("temporal_patch_size", default=1)
        channels = self.number("in_channels", "in_chans", "num_channels", default=3)
        return self.floats(BATCH * 16, channels * deep * side * side)

    def make_pixel_values(self) -> Tensor:
        if "grid_thw" in self.parameters or "image_grid_thw" in self.parameters:
            return self.patches()
        size = self.number("image_size", "img_size", "input_size", default=64)
        return self.floats(BATCH, self.number("num_channels", "in_channels", default=3), size, size)

    def make_pixel_values_videos(self) -> Tensor:
        size = self.number("image_size", "crop_size", default=32)
        frames = self.number("num_frames", "frames_per_clip", default=2)
        return self.floats(BATCH, frames, 3, size, size)

    def make_input_features(self) -> Tensor:
        bins = self.number("num_mel_bins", "feature_size", "input_feat_per_channel", default=80)
        frames = 2 * self.number("max_source_positions", default=32)
        if getattr(self.config, "model_type", "") in ("clap", "clap_audio_model"):
            return self.floats(BATCH, 1, 64, bins)
        time_last = getattr(self.config, "model_type", "") in ("whisper", "qwen2_audio", "voxtral")
        return self.floats(BATCH, bins, frames) if time_last else self.floats(BATCH, frames, bins)

    def make_input_values(self) -> Tensor:
        if self.number("conv_dim", default=0) or "moonshine" in str(self.config.model_type):
            return self.floats(BATCH, 4000)
        if self.number("num_mel_bins", default=0):
            frames = self.number("max_length", default=64)
            return self.floats(BATCH, frames, self.number("num_mel_bins", default=80))
        return self.floats(BATCH, 1, 4000)

    def make_hidden_states(self) -> Tensor:
        if "grid_thw" in self.parameters:
            return self.patches()
        return self.floats(BATCH, LENGTH, self.number("hidden_size", "d_model", default=64))

    make_inputs_embeds = make_hidden_states
    make_encoder_hidden_states = make_hidden_states

    def make_attention_mask(self) -> Tensor | None:
        main = self.values.get(self.main)
        if self.main == "input_features" and isinstance(main, Tensor):
            return torch.ones(BATCH, max(main.shape[1:]), dtype=torch.int64)
        if isinstance(main, Tensor) and main.ndim in (2, 3):
            return torch.ones(main.shape[:2], dtype=torch.int64)
        return ONES

    make_input_features_mask = make_attention_mask

    def make_bbox(self) -> Tensor:
        corners = torch.randint(0, 40, (BATCH, LENGTH, 2), generator=self.random)
        return torch.cat([corners, corners + 5], dim=-1)

    def make_position_ids(self) -> Tensor:
        return torch.arange(LENGTH).expand(BATCH, -1)
