"""`python -m zoo`, in several processes: all classes, or those whose names contain a word."""

from __future__ import annotations

import json
import multiprocessing
import resource
import time
from collections import Counter
from pathlib import Path
from typing import Annotated, Any

import typer
from rich.progress import track

from zoo.outcomes import PARTLY, REFUSED, RIGHT, UNUSED, WRONG, Outcome, first_line, look_at
from zoo.table import classes, write_table


def _one(place: tuple[str, str]) -> dict[str, Any]:
    import importlib

    began = time.monotonic()
    model_class = getattr(importlib.import_module(place[0]), place[1])
    try:
        outcome = look_at(model_class)
    except Exception as error:
        outcome = Outcome(place[1], "", WRONG, f"the zoo itself: {first_line(error)}")
    outcome.seconds = round(time.monotonic() - began, 2)
    return {**vars(outcome), "module": place[0]}


def _prepare() -> None:
    import transformers

    from hopper_attention.integrations.transformers import register

    resource.setrlimit(resource.RLIMIT_AS, (12 << 30, 12 << 30))
    transformers.utils.logging.set_verbosity_error()
    register()


def _earlier(file: Path) -> list[dict[str, Any]]:
    outcomes = [json.loads(line) for line in file.read_text().splitlines()]
    return [o for o in outcomes if o["kind"] in (RIGHT, PARTLY, REFUSED, UNUSED)]


def main(
    words: Annotated[list[str] | None, typer.Argument(help="parts of class names")] = None,
    json_file: Annotated[Path | None, typer.Option("--json", help="outcomes, a line each")] = None,
    table: Annotated[Path | None, typer.Option(help="the page whose table is written")] = None,
    processes: int = 2,
    keep: Annotated[
        Path | None, typer.Option(help="an earlier --json; what was right or refused is kept")
    ] = None,
) -> None:
    places = [p for p in classes() if not words or any(w.lower() in p[1].lower() for w in words)]
    outcomes = [] if keep is None else _earlier(keep)
    known = {(o["module"], o["name"]) for o in outcomes}
    places = [p for p in places if p not in known]
    if json_file is not None:
        json_file.parent.mkdir(parents=True, exist_ok=True)
    sink = None if json_file is None else json_file.open("w")
    for outcome in outcomes if sink is not None else ():
        sink.write(json.dumps(outcome) + "\n")
    with multiprocessing.get_context("spawn").Pool(
        processes, _prepare, maxtasksperchild=450
    ) as pool:
        runs = pool.imap_unordered(_one, places, chunksize=4)
        for outcome in track(runs, total=len(places), description="zoo"):
            outcomes.append(outcome)
            if sink is not None:
                sink.write(json.dumps(outcome) + "\n")
                sink.flush()
            if outcome["kind"] == WRONG or words:
                print(
                    outcome["name"],
                    outcome["kind"],
                    outcome["detail"],
                    outcome["seconds"],
                    flush=True,
                )
    print(dict(Counter(o["kind"] for o in outcomes)))
    if table is not None:
        write_table(table, outcomes)
    raise typer.Exit(any(o["kind"] == WRONG for o in outcomes))
