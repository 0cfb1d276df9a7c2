"""Continue a prompt with a model that train_gpt.py has trained, byte by byte.

python examples/generate.py --checkpoint DIR --prompt "The for statement"
"""

from __future__ import annotations

import codecs
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import Annotated

import torch
import typer
from torch import Tensor

from gpt import checkpoint as checkpoints
from gpt.data import BOUNDARY, Packing
from gpt.model import GPT, GPTConfig
from hopper_attention import flash_attn_func
from hopper_attention.errors import UserError


class CachedAttention:
    """Attention of new tokens over all that came before, whose keys and values it keeps.

    New queries are aligned with the last keys, which is what `causal` means here (bottom right).
    Queries see no further back than the context that the model was trained on.
    """

    def __init__(self, config: GPTConfig, length: int, device: torch.device):
        """`length`: the most tokens there will be."""
        shape = (config.layers, 1, length, config.heads_kv, config.head_dim)
        self.keys = torch.empty(shape, dtype=torch.bfloat16, device=device)
        self.values = torch.empty_like(self.keys)
        self.context = config.context
        self.layer = 0
        """Whose turn it is."""
        self.length = 0
        """Tokens kept; the caller adds its new ones when all layers have run."""

    def __call__(self, q: Tensor, k: Tensor, v: Tensor, packing: Packing) -> Tensor:
        layer, self.layer = self.layer, (self.layer + 1) % len(self.keys)
        end = self.length + len(q)
        self.keys[layer, 0, self.length : end] = k
        self.values[layer, 0, self.length : end] = v
        start = max(0, end - self.context - len(q) + 1)  # nobody sees further back
        seen = slice(start, end)
        keys, values = self.keys[layer, :, seen], self.values[layer, :, seen]
        return flash_attn_func(q[None], keys, values, causal=True)[0]


class Decoder:
    """A model, and the tokens it has seen."""

    def __init__(self, model: GPT, length: int, device: torch.device):
        self.model, self.device = model, device
        self.attention = CachedAttention(model.config, length, device)

    @torch.no_grad()
    def logits(self, ids: list[int]) -> Tensor:
        """(new tokens, vocabulary): takes the tokens in, and says what follows each."""
        kept, new = self.attention.length, len(ids)
        packing = Packing.of([new], new).to(self.device)
        packing = packing._replace(positions=packing.positions + kept)
        with torch.autocast(self.device.type, dtype=torch.bfloat16):
            logits = self.model(torch.tensor(ids, device=self.device), packing, self.attention)
        self.attention.length += new
        return logits


def generate(
    model: GPT,
    prompt: bytes,
    *,
    count: int,
    temperature: float = 1.0,
    top_k: int = 0,
    seed: int = 0,
    device: torch.device | None = None,
) -> Iterator[int]:
    """At most `count` bytes after the prompt, as they are drawn; ends where the document does.

    `temperature` 0: always the likeliest.  `top_k` 0: among all bytes.
    """
    device = device or torch.device("cpu")
    generator = torch.Generator().manual_seed(seed)
    ids = [BOUNDARY, *prompt][-model.config.context :]
    decoder = Decoder(model, len(ids) + count, device)
    for _ in range(count):
        token = draw(decoder.logits(ids)[-1].cpu(), temperature, top_k, generator)
        if token == BOUNDARY:
            return
        yield token
        ids = [token]


def draw(logits: Tensor, temperature: float, top_k: int, generator: torch.Generator) -> int:
    """One of the logits' (vocabulary,) tokens."""
    if temperature == 0:
        return int(logits.argmax())
    if 0 < top_k < len(logits):
        least = logits.topk(top_k).values[-1]
        logits = logits.masked_fill(logits < least, -torch.inf)
    share = torch.softmax(logits / temperature, dim=-1)
    return int(torch.multinomial(share, 1, generator=generator))


def main(
    checkpoint: Annotated[Path, typer.Option(help="Folder that train_gpt.py wrote.")],
    prompt: Annotated[str, typer.Option(help="What to continue.")] = "",
    max_tokens: Annotated[int, typer.Option(min=1, help="Bytes.")] = 400,
    temperature: Annotated[float, typer.Option(min=0, help="0: the likeliest byte.")] = 0.8,
    top_k: Annotated[int, typer.Option(min=0, help="Only of so many; 0: of all.")] = 40,
    seed: Annotated[int, typer.Option(min=0, help="Of what is drawn.")] = 0,
) -> None:
    """Sample text from a checkpoint."""
    device = torch.device("cuda" if torch.cuda.is_available() else "cpu")
    model = checkpoints.load_model(checkpoints.latest(checkpoint), device)
    typer.secho(prompt, nl=False, bold=True)
    decode = codecs.getincrementaldecoder("utf-8")(errors="replace").decode
    for token in generate(
        model, prompt.encode(), count=max_tokens, temperature=temperature, top_k=top_k,
        seed=seed, device=device,
    ):  # fmt: skip
        typer.echo(decode(bytes([token])), nl=False)
        sys.stdout.flush()
    typer.echo(decode(b"", final=True))


if __name__ == "__main__":
    try:
        typer.run(main)
    except (UserError, NotImplementedError) as refusal:
        typer.echo(f"error: {refusal}", err=True)
        sys.exit(2)
