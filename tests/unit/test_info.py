"""`hopper-attention info`."""

import json

import pytest
import torch
from typer.testing import CliRunner

from hopper_attention import backend
from hopper_attention.cli import app
from hopper_attention.dispatch import manifest


def test_info_shows_every_instance():
    shown = CliRunner().invoke(app, ["info"], env={"COLUMNS": "80"})
    assert shown.exit_code == 0, shown.output
    assert all(name in shown.output for name in manifest.instances())
    assert "…" not in shown.output  # nothing is cut off


CAPABILITIES = {"H200": (9, 0), "A100": (8, 0), "T4": (7, 5)}


@pytest.fixture
def gpus(monkeypatch):
    names, found = list(CAPABILITIES), list(CAPABILITIES.values())
    monkeypatch.setattr(torch.cuda, "device_count", lambda: len(found))
    monkeypatch.setattr(torch.cuda, "get_device_name", lambda index: names[index])
    monkeypatch.setattr(torch.cuda, "get_device_capability", lambda index: found[index])


def test_info_shows_the_backend_of_every_device(gpus):
    def backends() -> list[str | None]:
        shown = CliRunner().invoke(app, ["info", "--json"])
        assert shown.exit_code == 0, shown.output
        facts = json.loads(shown.stdout)
        return [facts["forced_backend"], *(device["backend"] for device in facts["devices"])]

    assert backends() == [None, "hopper", "ampere", None]
    with backend("ampere"):
        assert backends() == ["ampere", "ampere", "ampere", None]
    with backend("hopper"):
        assert backends() == ["hopper", "hopper", None, None]
    shown = CliRunner().invoke(app, ["info"], env={"COLUMNS": "200"}).output
    assert "A100 (sm_80): ampere" in shown
    assert "T4 (sm_75): no backend: compute capability 7.5" in shown
