"""Command line of the build: `list`, `flavour`, `compile`, `registry`.  CMakeLists.txt calls it."""

import json
from pathlib import Path
from typing import Annotated

import typer

from aot import flavour, outputs, sources
from aot.selection import select

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
) -> None:
    """Print the names of the selected instances."""
    known = sources.all_instances()
    try:
        instances = select(known, selection)
    except ValueError as fault:
        raise SystemExit(f"error: {fault}") from None
    if listed is not None:
        listed.write_text("\n".join(map(str, sources.imported_sources())) + "\n")
    if prune is not None:
        outputs.prune(prune, {i.name for i in known})
    print("\n".join(i.name for i in instances))


@app.command("flavour")
def resolve_flavour(cuda: str = "auto") -> None:
    """Print the CUDA major version that auto, 12 or 13 stands for here."""
    try:
        print(flavour.resolve(cuda))
    except ValueError as fault:
        raise SystemExit(f"error: {fault}") from None


@app.command("compile")
def compile_one(
    name: str,
    out: Annotated[Path, typer.Option(help="Folder for the outputs.")],
    depfile: Annotated[Path | None, typer.Option(help="Where to write the dependencies.")] = None,
    cuda: Annotated[str, typer.Option(help="CUDA to compile for: auto, 12 or 13.")] = "auto",
) -> None:
    """Compile instance NAME to OUT/NAME.{o,h,ptx,cubin,json}."""
    from aot import compile as compiler  # what `list` does not need should not be its dependency

    (instance,) = select(sources.all_instances(), name)
    try:
        compiler.compile_instance(instance, out, flavour.resolve(cuda))
    except compiler.ptxas.GateError as fault:
        raise SystemExit(f"error: {fault} (outputs are kept in {out / name}.scratch)") from None
    if depfile is not None:
        outputs.write_depfile(depfile, out / f"{name}.o", out / f"{name}.json")


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
