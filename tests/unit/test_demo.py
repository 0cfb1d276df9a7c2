"""`hopper-attention demo`."""

import json

import pytest
from typer.testing import CliRunner

from hopper_attention import backend
from hopper_attention.cli import app
from hopper_attention.errors import UserError

SMALL = ["demo", "--tokens", "20", "--json"]


@pytest.mark.parametrize("name", ["hopper", "ampere"])
def test_names_the_kernel_that_ran(name):
    with backend(name):
        shown = CliRunner().invoke(app, SMALL)
    assert shown.exit_code == 0, shown.output
    instance = json.loads(shown.stdout)["instance"]["name"]
    assert instance.startswith("ampere" if name == "ampere" else "fwd_bf16_d128_causal")


def test_needs_a_kernel():
    with backend("reference"):
        shown = CliRunner().invoke(app, SMALL)
    assert isinstance(shown.exception, UserError)
    assert "HOPPER_ATTENTION_BACKEND=reference" in str(shown.exception)
