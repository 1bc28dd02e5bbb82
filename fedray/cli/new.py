"""`fedray new`: a config to start from."""

from pathlib import Path
from typing import Annotated

import typer

from fedray.cli.console import out, short, table
from fedray.cli.entry import app


@app.command()
def new(
    folder: Annotated[
        Path | None,
        typer.Argument(metavar="[DIR]", help="An empty or new folder; without it: the templates."),
    ] = None,
    template: Annotated[str, typer.Option(help="The config to copy.")] = "quickstart",
) -> None:
    """Write a commented config into a folder, or list the configs that there are."""
    from fedray.config.shipped import summary, templates, write_template

    if folder is None:
        listed = table("template", "what it is")
        for name, path in templates().items():
            listed.add_row(name, summary(path))
        out.print(listed)
        out.print("To copy one: fedray new DIR --template NAME", highlight=False)
        return
    config, *_ = write_template(folder, template)
    command = config.read_text(encoding="utf-8").partition("\n")[0].removeprefix("# ")
    out.print(f"{short(config)} is written. Next:", highlight=False, soft_wrap=True)
    out.print(f"  cd {short(folder)} && {command}", highlight=False, soft_wrap=True)
