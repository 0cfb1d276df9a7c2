"""README's snippets, one after another as a reader would run them."""

from __future__ import annotations

import re

import pytest


@pytest.mark.simulator
def test_snippets_run(root, tmp_path, monkeypatch):
    """On what is there; models are saved in a folder of their own."""
    monkeypatch.chdir(tmp_path)
    text = (root / "README.md").read_text()
    snippets = re.findall(r"^```python\n(.*?)^```$", text, re.MULTILINE | re.DOTALL)
    assert len(snippets) >= 4
    names: dict[str, object] = {}
    for number, snippet in enumerate(snippets):
        exec(compile(snippet, f"README.md, snippet {number + 1}", "exec"), names)
    assert names["tokens"].shape == (1, 10)
    assert names["out"].shape == (1, 256, 2, 128) and names["out"].isfinite().all()
