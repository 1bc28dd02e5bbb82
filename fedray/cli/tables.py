"""`fedray methods | samplers | codecs | models | …`: the tables that a config chooses from."""

import inspect
import json
import sys
from collections.abc import Mapping
from typing import TYPE_CHECKING, Annotated, Any

import typer

from fedray.cli.completion import read_listing
from fedray.cli.console import escape, out
from fedray.cli.console import table as new_table
from fedray.cli.entry import Import, Name, app, import_all
from fedray.errors import ConfigError, unknown

if TYPE_CHECKING:
    from fedray.federation.method import Method


@app.command()
def methods(
    name: Name = None,
    imports: Import = None,
) -> None:
    """List the methods; or show one with its options."""
    if name is not None:
        import_all(imports)
        return _method(name)
    if imports:
        import_all(imports)
        listed = listing()
    else:  # the file saves the import of torch, which takes seconds
        listed = read_listing()
    table = new_table("method", "what it is", "source", "needs")
    for row in listed["methods"]:
        table.add_row(*row)
    out.print(table)
    out.print(f"Every method has: {listed['common']}\nIn full: fedray methods NAME")


def listing() -> dict[str, Any]:
    """Return the rows of the list of methods, the options of every method, and the words of completion."""
    from dataclasses import fields

    from fedray.config.run_config import RunConfig
    from fedray.config.tables import OPTIONS, TABLES
    from fedray.config.trees import flatten
    from fedray.federation.method import Method
    from fedray.methods import METHODS

    rows = [[name, _title(kind), kind.citation, _needs(kind) or "—"] for name, kind in METHODS.items()]
    open_sections = ("clients.devices", "clients.resources.by_device")
    keys = dict.fromkeys(flatten(RunConfig().to_tree(), lambda key: key not in open_sections))
    for section, table in OPTIONS.items():
        keys |= dict.fromkeys(f"{section}.{f.name}" for kind in table.values() for f in fields(kind))
    return {
        "methods": rows,
        "common": ", ".join(f"{f.name}={f.default}" for f in fields(Method)),
        "keys": sorted(keys),
        "choices": {key: sorted(table) for key, table in TABLES.items()},
    }


@app.command()
def samplers(
    name: Name = None,
    imports: Import = None,
) -> None:
    """List the client samplers; or show one with its options."""
    import_all(imports)
    from fedray.federation.sampling import SAMPLERS

    if name is not None:
        return _describe_entry("sampler", name, SAMPLERS, "clients.sampler")
    _list_entries("sampler", SAMPLERS, "clients.sampler")


@app.command()
def codecs(
    name: Name = None,
    imports: Import = None,
) -> None:
    """List the codecs of updates; or show one with its options."""
    import_all(imports)
    from fedray.costs.differences import CODECS

    if name is not None:
        return _describe_entry("codec", name, CODECS, "clients.uplink")
    _list_entries("codec", CODECS, "clients.uplink")


@app.command()
def models(imports: Import = None) -> None:
    """List the models, with their sizes on each data set."""
    import_all(imports)
    from fedray.data import DATASETS
    from fedray.models import MODELS, outline, refusal

    table = new_table("model", "layers", "source", *(f"weights on {name}" for name in DATASETS))
    for name, architecture in MODELS.items():
        sizes, faults = [], []
        for spec in DATASETS.values():
            if refusal(architecture, spec.input_shape, spec.tokens):
                sizes.append("—")
                continue
            try:
                sizes.append(f"{outline(name, spec.input_shape, spec.num_classes).layout.size:,}")
            except ConfigError as error:
                sizes.append("broken")
                faults.append(str(error))
        summary = f"{architecture.summary}\n{faults[0]}" if faults else architecture.summary
        table.add_row(name, escape(summary), architecture.source, *sizes)
    out.print(table)


@app.command()
def datasets(imports: Import = None) -> None:
    """List the data sets."""
    import_all(imports)
    from fedray.data import DATASETS

    table = new_table("data set", "train", "test", "shape", "classes", "data.root holds", "source")
    for name, spec in DATASETS.items():
        shape = "×".join(map(str, spec.input_shape))
        table.add_row(
            name,
            _count(spec.train_examples),
            _count(spec.test_examples),
            shape,
            str(spec.num_classes),
            spec.files or "embedded",
            spec.source,
        )
    out.print(table)


def _count(examples: int | None) -> str:
    return "by files" if examples is None else f"{examples:,}"


@app.command()
def partitions(
    name: Name = None,
    imports: Import = None,
) -> None:
    """List the kinds of partition; or show one with its options."""
    import_all(imports)
    from fedray.data import PARTITIONS

    if name is None:
        _list_entries("partition", PARTITIONS, "data.partition")
    else:
        _describe_entry("partition", name, PARTITIONS, "data.partition")


@app.command()
def devices(
    sources: Annotated[bool, typer.Option(help="Give the source of every number.")] = True,
    imports: Import = None,
) -> None:
    """List the simulated devices and links, each number with its source."""
    import_all(imports)
    from fedray.costs.devices import DEVICES, profile
    from fedray.costs.hardware import HARDWARE
    from fedray.costs.links import LINKS

    profiles = {name: profile(name) for name in dict.fromkeys((*DEVICES, *HARDWARE))}
    table = new_table(
        "device",
        "GFLOP/s",
        "ms a step",
        "s an exchange",
        "W computing",
        "W idle",
        "down MB/s",
        "up MB/s",
        "latency s",
        "memory GiB",
        "available",
        "drops out",
    )
    for name, device in profiles.items():
        table.add_row(
            name,
            f"{device.flops_per_s / 1e9:,.3g}",
            f"{1e3 * device.step_s:.3g}",
            f"{device.round_s:.3g}",
            f"{device.compute_w:.3g}",
            f"{device.idle_w:.3g}",
            f"{device.downlink_bytes_per_s / 1e6:,.3g}",
            f"{device.uplink_bytes_per_s / 1e6:,.3g}",
            f"{device.latency_s:.3g}",
            f"{device.memory_bytes / 2**30:.3g}",
            f"{device.availability:.0%}",
            f"{device.dropout:.0%}",
        )
    out.print(table)
    out.print(f"On another link: DEVICE@LINK, e.g. raspberry_pi_4@lte. Links: {', '.join(LINKS)}")
    if sources:
        for name, device in profiles.items():
            out.print(f"\n[bold]{name}[/bold]")
            for field, source in device.sources.items():
                out.print(f"  {field}: {source}", highlight=False)


@app.command()
def schema(
    training: Annotated[bool, typer.Option("--training", help="Of files that train an agent.")] = False,
    imports: Import = None,
) -> None:
    """Print the JSON schema of config files, by which editors complete and check YAML."""
    import_all(imports)
    from fedray.config.run_config import RunConfig
    from fedray.config.schema import file_schema

    if training:
        from rllib_pruner.config import TrainConfig

        written = file_schema(TrainConfig)
    else:
        written = file_schema(RunConfig)
    sys.stdout.write(json.dumps(written, indent=1, ensure_ascii=False) + "\n")


def _method(name: str) -> None:
    """Print one method: its summary, its own options, their defaults and meaning."""
    from dataclasses import fields

    from fedray.federation.method import Method
    from fedray.methods import METHODS

    if name not in METHODS:
        raise ConfigError(unknown("method", name, METHODS))
    method, shared = METHODS[name], {field.name for field in fields(Method)}
    own = [f"method.{field.name}={field.default}" for field in fields(method) if field.name not in shared]
    out.print(f"{name}: {_title(method)}", style="bold", highlight=False)
    out.print(f"Source: {method.citation or '—'}   Needs: {_needs(method) or '—'}\n", highlight=False)
    out.print(escape(inspect.getdoc(method) or ""), highlight=False)
    out.print("\nDefaults: " + ("  ".join(own) or "no further options"), highlight=False)


def _list_entries(what: str, table: Mapping[str, type[Any]], section: str) -> None:
    """Print a table of dataclasses that a section of the config chooses from."""
    from fedray.config.trees import CHOICES

    listed = new_table(what, "what it does", "options", "source")
    for name, entry in table.items():
        options = escape(_defaults(entry)) or "—"
        listed.add_row(name, escape(_first_line(entry)), options, escape(_citation(entry)))
    out.print(listed)
    example = f"{section}.{CHOICES[section]}=NAME"
    out.print(f"In full: fedray {what}s NAME   To choose one: {example}", highlight=False)


def _describe_entry(what: str, name: str, table: Mapping[str, type[Any]], section: str) -> None:
    """Print one entry of such a table: its purpose, options and defaults.

    Raises:
        ConfigError: if the table has no such entry.
    """
    if name not in table:
        raise ConfigError(unknown(what, name, table))
    out.print(f"{name}: {_first_line(table[name])}", style="bold", highlight=False)
    if _citation(table[name]) != "—":
        out.print(f"Source: {_citation(table[name])}", highlight=False)
    out.print(escape(inspect.getdoc(table[name]) or "").partition("\n")[2], highlight=False)
    out.print(f"\nDefaults: {_defaults(table[name], f'{section}.') or 'no options'}", highlight=False)


def _first_line(entry: type) -> str:
    """Return the first line of a class's docstring."""
    return (inspect.getdoc(entry) or "").partition("\n")[0]


def _defaults(entry: type[Any], prefix: str = "") -> str:
    """Return the options of a dataclass with their defaults."""
    from dataclasses import asdict

    return "  ".join(f"{prefix}{name}={value}" for name, value in asdict(entry()).items())


def _citation(entry: type) -> str:
    """Return the class's own source, without inheritance; else a dash."""
    return str(vars(entry).get("citation") or "—")


def _title(method: type["Method"]) -> str:
    """Return the first line of the method's file."""
    first = (sys.modules[method.__module__].__doc__ or method.__doc__ or "").strip().splitlines()[0]
    return first.split(".  ")[0]


def _needs(method: type["Method"]) -> str:
    server = ["data.server_fraction"] * method.uses_server_data
    return "; ".join([*server, *[method.needs] * bool(method.needs)])
