"""`fedray agent`: the commands of `rllib_pruner`."""

from importlib import import_module
from typing import Any

import typer
import typer.core
import typer.main

from fedray.cli.entry import app

AGENT_COMMANDS = {
    "train": "rllib_pruner.train",
    "evaluate": "rllib_pruner.evaluate",
    "judge": "rllib_pruner.stages.judge",
}
"""Name of a command of `fedray agent` → the module whose `app` it is."""


class _AgentGroup(typer.core.TyperGroup):
    """The commands of `fedray agent`; each imports its module, and with it RLlib, when it is used."""

    def list_commands(self, ctx: Any) -> list[str]:
        return list(AGENT_COMMANDS)

    def get_command(self, ctx: Any, cmd_name: str) -> Any:
        if cmd_name not in AGENT_COMMANDS:
            return None
        return typer.main.get_command(import_module(AGENT_COMMANDS[cmd_name]).app)


app.add_typer(
    typer.Typer(cls=_AgentGroup, help="Train, evaluate and judge agents.", no_args_is_help=True), name="agent"
)
