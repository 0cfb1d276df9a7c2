"""The `hopper-attention` command."""

from __future__ import annotations

import sys

import typer

from hopper_attention.cli.accuracy import accuracy
from hopper_attention.cli.bench import bench
from hopper_attention.cli.demo import demo
from hopper_attention.cli.info import info
from hopper_attention.cli.profile import profile
from hopper_attention.cli.sass import sass
from hopper_attention.cli.simulate import simulate
from hopper_attention.errors import UserError

TOOLS = ("elftools", "matplotlib", "networkx", "tomli")
"""Packages that only the extra `tools` installs."""

app = typer.Typer(
    help="Exact attention for NVIDIA Hopper GPUs.", no_args_is_help=True, add_completion=False
)
app.command()(info)
app.command()(demo)
app.command()(sass)
app.command()(simulate)
app.add_typer(accuracy, name="accuracy")
app.add_typer(bench, name="bench")
app.add_typer(profile, name="profile")


def main() -> None:
    try:
        app()
    except UserError as refusal:
        typer.echo(f"error: {refusal}", err=True)
        sys.exit(2)
    except ModuleNotFoundError as missing:
        package = (missing.name or "").partition(".")[0]
        if package not in TOOLS:
            raise
        typer.echo(f"error: no {package}: pip install 'hopper-attention[tools]'", err=True)
        sys.exit(2)
