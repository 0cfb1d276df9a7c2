import typer

from zoo.run import main

typer.run(main)
