"""The `hopper-attention` command."""

from __future__ import annotations

import typer

from hopper_attention.cli.demo import demo
from hopper_attention.cli.info import info

app = typer.Typer(
    help="Exact attention for NVIDIA Hopper GPUs.", no_args_is_help=True, add_completion=False
)
app.command()(info)
app.command()(demo)


def main() -> None:
    app()
