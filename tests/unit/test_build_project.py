"""pyproject.toml says some things twice, because the tools that read it leave no choice."""

import sys

import pytest

if sys.version_info >= (3, 11):
    import tomllib
else:
    tomllib = pytest.importorskip("tomli")


def test_build_without_isolation_installs_what_isolated_builds_do(root):
    project = tomllib.loads((root / "pyproject.toml").read_text())
    group = set(project["dependency-groups"]["build"])
    isolated = {
        *project["build-system"]["requires"],
        *project["tool"]["scikit-build"]["build"]["requires"],
    }
    tools = {r for r in group if r.startswith(("cmake", "ninja"))}  # scikit-build-core adds these
    assert group - tools == isolated
