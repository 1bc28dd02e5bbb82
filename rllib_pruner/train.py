"""The command that trains an agent.

    fedray agent train tune_configs/rl_rate_search.yaml [KEY=VALUE]… [--out DIR] [--ship]
    fedray agent train --resume DIR

`python -m rllib_pruner.train` is the same command. Exit status: 0 done, 1 failed on the way, 2 cannot run as
asked, 130 interrupted.
"""

import logging
import shutil
from pathlib import Path
from typing import TYPE_CHECKING, Annotated

import typer
from rich.console import Console

from fedray.errors import ConfigError
from rllib_pruner.commands import err, run_app

if TYPE_CHECKING:  # imported where they are used, so that --help does not wait for Ray
    from rllib_pruner.files import Row

RUNS = Path("runs")
out = Console(soft_wrap=True, highlight=False)
app = typer.Typer(add_completion=False, pretty_exceptions_enable=False)


@app.command()
def train(
    file: Annotated[
        Path | None, typer.Argument(help="A YAML file, e.g. tune_configs/rl_rate_search.yaml.")
    ] = None,
    overrides: Annotated[
        list[str] | None, typer.Argument(metavar="[KEY=VALUE]…", help="e.g. algorithm.lr=3e-4 seed=1")
    ] = None,
    out_dir: Annotated[Path | None, typer.Option("--out", help="Default: the next under runs/.")] = None,
    resume: Annotated[Path | None, typer.Option(help="Resume the training in this directory.")] = None,
    ship: Annotated[bool, typer.Option(help="Put the policy into the package.")] = False,
    address: Annotated[
        str | None, typer.Option(help="Ray cluster: auto or HOST:PORT; default: RAY_ADDRESS, or a local Ray.")
    ] = None,
) -> None:
    """Train an agent with RLlib; the best policy is in DIR/policy."""
    from fedray.durable import local_path
    from fedray.experiment.cluster import start_ray
    from fedray.experiment.reaching import use
    from fedray.policies.trained import shipped
    from fedray.storage.directory import take_next
    from rllib_pruner.config import Plan
    from rllib_pruner.files import TrainFiles
    from rllib_pruner.training import resume as resume_one
    from rllib_pruner.training import train as train_one
    from rllib_pruner.trials import train_all

    use(address)
    if (file is None) == (resume is None):
        raise ConfigError("give either a YAML file, or --resume with the directory of an earlier training")
    if resume is not None:
        if out_dir is not None or overrides:
            raise ConfigError("--resume continues a training unchanged: it takes neither --out nor key=value")
        config = TrainFiles.open(resume).config()
        process, directory = config.process.name, resume
        config.process.options.prepare(err.print)
        resume_one(resume, on_evaluation=_say)
    else:
        assert file is not None
        plan = Plan.load(file, overrides or [])
        process, is_next = next(iter(plan.trials.values())).process.name, out_dir is None
        for trial in plan.trials.values():
            trial.process.options.prepare(err.print)
        err.print("starting Ray …")
        start_ray()  # before anything is left on disk
        inner = "trials" if plan.has_space else "checkpoints"
        directory = out_dir or take_next(local_path(RUNS), plan.name, inner, "training")
        err.print(f"training in {directory}")
        if plan.has_space:
            err.print(f"best: {train_all(plan, directory, _say_trial, taken=is_next)}")
        else:
            train_one(plan.trials[""], directory, on_evaluation=_say, taken=is_next)
    curve = f"Learning curve: {directory}/curve.png   " if (directory / "curve.png").is_file() else ""
    out.print(f"Policy: {directory}/policy   {curve}MLflow: fedray ui")
    if ship:
        target = shipped(process)
        shutil.rmtree(target, ignore_errors=True)
        shutil.copytree(directory / "policy", target)
        out.print(f"Shipped to {target}")


def _say(row: "Row") -> None:
    """Show an evaluation in a line."""
    shown = {name: value for name, value in row.items() if name == "score" or "/" in name}
    measures = "  ".join(f"{name} {value:.3g}" for name, value in shown.items())
    err.print(f"{row['env_steps']:>7,} steps  return {row.get('return', float('nan')):.2f}  {measures}")


def _say_trial(name: str, row: "Row") -> None:
    err.print(f"{name}: {row['env_steps']:>7,} steps  score {row['score']:.3g}")


def main() -> None:
    """Run the command line."""
    logging.basicConfig(level=logging.WARNING, format="%(levelname)s %(name)s: %(message)s")
    run_app(app)


if __name__ == "__main__":
    main()
