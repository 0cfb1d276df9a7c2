"""Command line of the build: `list`, `flavour`, `compile`, `registry`.  CMakeLists.txt calls it."""

import json
from pathlib import Path
from typing import Annotated

import typer

from aot import flavour, outputs, sources
from aot.selection import batches, select

app = typer.Typer(add_completion=False, no_args_is_help=True, pretty_exceptions_enable=False)


@app.callback()
def _main() -> None:
    sources.make_importable()


@app.command("list")
def list_instances(
    selection: Annotated[str, typer.Option(help="core, full, or names with wildcards.")] = "core",
    listed: Annotated[
        Path | None, typer.Option("--sources", help="Write the files that decide on the list here.")
    ] = None,
    prune: Annotated[
        Path | None,
        typer.Option(help="Remove outputs of instances that are no longer listed here."),
    ] = None,
    cores: Annotated[
        int | None, typer.Option(help="Join the names that one process compiles on so many cores.")
    ] = None,
) -> None:
    """Print the names of the selected instances, a line each, or a line for each batch."""
    known = sources.all_instances()
    try:
        instances = select(known, selection)
    except ValueError as fault:
        raise SystemExit(f"error: {fault}") from None
    if listed is not None:
        listed.write_text("\n".join(map(str, sources.imported_sources())) + "\n")
    if prune is not None:
        outputs.prune(prune, {i.name for i in known})
    lines = [[i] for i in instances] if cores is None else batches(instances, cores)
    print("\n".join(" ".join(i.name for i in line) for line in lines))


@app.command("flavour")
def resolve_flavour(cuda: str = "auto") -> None:
    """Print the CUDA major version that auto, 12 or 13 stands for here."""
    try:
        print(flavour.resolve(cuda))
    except ValueError as fault:
        raise SystemExit(f"error: {fault}") from None


@app.command("compile")
def compile_instances(
    names: Annotated[list[str], typer.Argument(help="Instances of one architecture.")],
    out: Annotated[Path, typer.Option(help="Folder for the outputs.")],
    depfile: Annotated[Path | None, typer.Option(help="Where to write the dependencies.")] = None,
    cuda: Annotated[str, typer.Option(help="CUDA to compile for: auto, 12 or 13.")] = "auto",
) -> None:
    """Compile each instance of NAMES to OUT/<instance>.{o,h,ptx,cubin,json}."""
    from aot import batch  # what `list` does not need should not be its dependency

    instances = select(sources.all_instances(), " ".join(names))
    try:
        batch.compile_batch(instances, out, flavour.resolve(cuda))
    except batch.BatchError as fault:
        raise SystemExit(f"error: {fault}") from None
    if depfile is not None:
        records = [out / f"{instance.name}.json" for instance in instances]
        outputs.write_depfile(depfile, records[0].with_suffix(".o"), records)


@app.command("registry")
def registry(
    kernels: Annotated[Path, typer.Option(help="Folder with the instances' JSON files.")],
    names: Annotated[str, typer.Option(help="Instances, separated by semicolons.")],
    source: Annotated[Path, typer.Option(help="C++ file to write.")],
    manifest: Annotated[Path, typer.Option(help="JSON file to write.")],
) -> None:
    """Write the C++ registry and the manifest of the compiled instances."""
    from aot import registry as generator

    records = [json.loads((kernels / f"{name}.json").read_text()) for name in names.split(";")]
    source.write_text(generator.cpp(records))
    manifest.write_text(generator.manifest(records))


if __name__ == "__main__":
    app(prog_name="aot")
