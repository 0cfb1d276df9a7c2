"""The list of classes, and the page that says what became of them."""

from __future__ import annotations

import datetime
import importlib
import sys
from collections import Counter, defaultdict
from pathlib import Path
from typing import Any

from zoo.outcomes import PARTLY, REFUSED, RIGHT, UNBUILT, UNUSED, WRONG

BEGIN = "<!-- from here on written by `make zoo` -->"
ORDER = (WRONG, PARTLY, REFUSED, RIGHT, UNUSED, UNBUILT)


def classes() -> list[tuple[str, str]]:
    """(module, class) of every model that transformers exports, without the abstract ones."""
    import transformers

    found = []
    for path in sorted((Path(transformers.__file__).parent / "models").glob("*/modeling_*.py")):
        name = f"transformers.models.{path.parent.name}.{path.stem}"
        try:
            module = importlib.import_module(name)
        except ImportError as error:
            print(f"{name}: {error}", file=sys.stderr)
            continue
        for exported in getattr(module, "__all__", ()):
            thing = getattr(module, exported, None)
            if (
                isinstance(thing, type)
                and issubclass(thing, transformers.PreTrainedModel)
                and thing.__module__ == name
                and not exported.endswith("PreTrainedModel")
                and not _abstract(thing)
            ):
                found.append((name, exported))
    return found


def _abstract(model_class: type) -> bool:
    import torch

    return model_class.forward is torch.nn.Module.forward  # type: ignore[attr-defined]


def write_table(page: Path, outcomes: list[dict[str, Any]]) -> None:
    """Replace what follows BEGIN in `page`."""
    import transformers

    before = page.read_text().split(BEGIN)[0]
    counts = Counter(o["kind"] for o in outcomes)
    lines = [
        f"{datetime.date.today()}, transformers {transformers.__version__}: "
        + ", ".join(f"{counts[kind]} {kind}" for kind in ORDER if counts[kind])
        + f"; {len(outcomes)} classes.",
        "",
        "| model | classes | outcome | runs, or why |",
        "|---|---|---|---|",
    ]
    lines += [
        f"| {model} | {', '.join(sorted(names))} | {kind} | {detail} |"
        for (model, kind, detail), names in sorted(_grouped(outcomes).items())
    ]
    page.write_text(before + BEGIN + "\n\n" + "\n".join(lines) + "\n")


def _grouped(outcomes: list[dict[str, Any]]) -> dict[tuple[str, str, str], list[str]]:
    groups: dict[tuple[str, str, str], list[str]] = defaultdict(list)
    for outcome in outcomes:
        model = outcome["module"].split(".")[2]
        groups[model, outcome["kind"], _short(outcome)].append(outcome["name"])
    return groups


def _short(outcome: dict[str, Any]) -> str:
    """The detail without what is the same in every row."""
    detail = outcome["detail"]
    if outcome["kind"] == UNBUILT:
        detail = detail.split("; ")[0]
    for name in ("hopper_attention: ", outcome["name"] + " "):
        detail = detail.replace(name, "")
    if " and would not call this" in detail:
        detail = detail[: detail.index(" and would not call this")]
    for end in ("; use ", ".  Use ", ".  Give ", " use attn_impl"):
        detail = detail.split(end)[0]
    detail = " ".join(detail.replace("|", "/").replace("<", "(").replace(">", ")").split())
    return detail[:160].rstrip()
