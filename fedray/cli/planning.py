"""`fedray plan`: what a run or a sweep will take, before anything runs."""

from itertools import cycle, islice
from typing import Annotated

import typer

from fedray.cli.console import err, escape, number, say, say_json
from fedray.cli.entry import Address, File, Import, Json, Overrides, Trust, app, imports_override, use_cluster


@app.command("plan")
def plan_(
    file: File,
    overrides: Overrides = None,
    imports: Import = None,
    trust: Trust = False,
    address: Address = None,
    measure: Annotated[
        bool, typer.Option(help="Run three real rounds of each kind of point, or only count.")
    ] = True,
    json: Json = False,
) -> None:
    """Estimate what a run or a sweep takes: rounds, bytes, FLOPs, time, memory, disk."""
    from fedray.config import yaml_text
    from fedray.config.run_config import RunConfig
    from fedray.config.shipped import located
    from fedray.overview.summary import plain
    from fedray.overview.watching import duration
    from fedray.sweeps.planning import plan

    use_cluster(address)
    changes = [*(overrides or []), *imports_override(file, imports)]
    if yaml_text.load(located(file)).get("space") or any(change.startswith("space.") for change in changes):
        from fedray.sweeps.space import Sweep

        swept = Sweep.load(file, changes)
        configs = [point.config for point in swept.points]
        if not configs:  # a search: the ends of its space stand for the points
            configs = list(islice(cycle(swept.sample), swept.most))
        found = plan(configs, swept.tune.concurrent, sweeps=True, measures=measure)
    else:
        found = plan([RunConfig.load(file, changes)], None, sweeps=False, measures=measure)
    if json:
        return say_json(plain(found.to_json()))
    trials = f"{found.trials} trials, {found.concurrent} at once" if found.trials > 1 else "1 run"
    say(f"{trials}: {found.rounds:,} rounds in all")
    if found.wall_s is not None:
        say(f"sent by clients  about {number((found.up_bytes or 0) / 1e6)} MB")
        say(f"sent to clients  about {number((found.down_bytes or 0) / 1e6)} MB")
        flops = [number((value or 0) / 1e12) for value in (found.executed_flops, found.flops)]
        say(f"client FLOPs     about {flops[0]} T executed, {flops[1]} T theoretical")
        say(f"client energy    about {number((found.energy_j or 0) / 1e3)} kJ")
        bound = [duration(value or 0) for value in (found.compute_bound_s, found.network_bound_s)]
        say(f"simulated time   about {duration(found.simulated_s or 0)}")
        say(f"                 {bound[0]} if bound by computing, {bound[1]} if bound by the network")
        say(f"time             about {duration(found.wall_s)} on {found.where}")
        memory = number((found.memory_bytes or 0) / 2**20)
        say(f"memory           about {memory} MiB for each process that trains")
        say(f"disk             about {number((found.disk_bytes or 0) / 1e6)} MB")
        say("Measured here: three rounds of each kind of point; later ones cost less where a method prunes")
    elif found.where != "this machine":
        say(f"on {found.where}")
    for problem in found.problems:
        err.print(f"[bold red]does not fit:[/bold red] {escape(problem)}", highlight=False, soft_wrap=True)
    if found.problems:
        raise typer.Exit(1)
