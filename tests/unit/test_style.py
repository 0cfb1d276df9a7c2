"""Docstrings are sentences about the thing itself; kernels have few arguments."""

from __future__ import annotations

import ast
import re
from collections.abc import Iterator
from pathlib import Path

FOLDERS = ("hopper", "cute_kernels", "python", "benchmarks", "examples", "tests")
FRAGMENT = re.compile(r"(Of|What|Whether|By|Where|The same|As)\b")
"""Beginnings of docstrings whose subject stands elsewhere."""
SHARE = 0.02
MOST_ARGUMENTS = 13
"""The limit of a kernel's `__call__`, self and the stream included; more of them are grouped."""
DOCUMENTED = (ast.FunctionDef, ast.AsyncFunctionDef, ast.ClassDef)


def docstrings(path: Path) -> Iterator[tuple[int, str]]:
    """Line and text, also of strings below constants and fields."""
    tree = ast.parse(path.read_text())
    for node in ast.walk(tree):
        if isinstance(node, (ast.Module, *DOCUMENTED)) and (text := ast.get_docstring(node)):
            yield getattr(node, "lineno", 1), text
        body = getattr(node, "body", None)
        for first, second in zip(body, body[1:]) if isinstance(body, list) else ():
            if isinstance(first, (ast.Assign, ast.AnnAssign)) and isinstance(second, ast.Expr):
                value = getattr(second.value, "value", None)
                if isinstance(value, str):
                    yield second.lineno, value


def test_few_docstrings_are_fragments(root):
    found, fragments = 0, []
    for path in (path for name in FOLDERS for path in (root / name).rglob("*.py")):
        for line, text in docstrings(path):
            found += 1
            if FRAGMENT.match(text):
                fragments.append(f"{path.relative_to(root)}:{line}: {text.splitlines()[0]}")
    assert found > 1000
    assert len(fragments) <= SHARE * found, "\n".join(fragments)


def test_kernels_have_few_arguments(root):
    paths = (path for name in ("hopper", "cute_kernels") for path in (root / name).rglob("*.py"))
    counts = {
        f"{path.relative_to(root)}:{function.lineno}": len(function.args.args)
        for path in paths
        for function in ast.walk(ast.parse(path.read_text()))
        if isinstance(function, ast.FunctionDef) and function.name == "__call__"
    }
    assert len(counts) > 10
    assert max(counts.values()) <= MOST_ARGUMENTS, counts
