"""Which instances a build compiles: `core`, `full`, or names with wildcards; in which batches."""

import re
from collections.abc import Sequence
from fnmatch import fnmatchcase
from itertools import groupby
from typing import Any

LARGEST_BATCH = 8
"""Importing the DSL then adds 2 % to compiling."""
BATCHES_PER_CORE = 4
"""At least, so that all cores are busy nearly to the end."""


def select(instances: Sequence[Any], selection: str) -> list[Any]:
    """The instances that `selection` names, in the order of their list.

    `selection` is words separated by commas, semicolons or spaces; each is `full`, the name of a
    group, or a pattern for names.  A word that matches nothing is an error: it is a misspelling.
    """
    words = [word for word in re.split(r"[,;\s]+", selection) if word]
    if not words:
        raise ValueError("no instances selected; say core, full, or names with wildcards")

    def matching(word: str) -> set[str]:
        return {i.name for i in instances if word in ("full", i.group) or fnmatchcase(i.name, word)}

    chosen: set[str] = set()
    for word in words:
        matches = matching(word)
        if not matches:
            names = ", ".join(i.name for i in instances)
            raise ValueError(f"no instance matches {word!r}; there are: {names}")
        chosen |= matches
    return [i for i in instances if i.name in chosen]


def batches(instances: Sequence[Any], cores: int) -> list[list[Any]]:
    """Cut `instances` into what one process compiles: neighbours of one architecture."""
    size = min(max(len(instances) // (BATCHES_PER_CORE * cores), 1), LARGEST_BATCH)
    runs = (list(run) for _, run in groupby(instances, key=lambda i: i.architecture))
    return [run[start : start + size] for run in runs for start in range(0, len(run), size)]
