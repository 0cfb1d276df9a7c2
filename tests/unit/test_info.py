"""`hopper-attention info`."""

from typer.testing import CliRunner

from hopper_attention import manifest
from hopper_attention.cli import app


def test_info_shows_every_instance():
    shown = CliRunner().invoke(app, ["info"], env={"COLUMNS": "200"})
    assert shown.exit_code == 0, shown.output
    assert all(name in shown.output for name in manifest.instances())
