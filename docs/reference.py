"""Writes what docstrings and types of the code say: docs/config.md, the JSON schemas, the list of methods.

And the tables of pages that come from files of results (`docs/tables.py`).

    make docs

tests/test_reference.py fails while a file is not what this module writes.
"""

import json
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import fields
from os.path import relpath
from pathlib import Path
from typing import Any

from pydantic import TypeAdapter

from docs.tables import pages, with_tables
from fedray.cli import listing
from fedray.config.choice import described
from fedray.config.docstrings import summary
from fedray.config.run_config import RunConfig
from fedray.config.schedulers import SCHEDULERS
from fedray.config.schema import file_schema
from fedray.config.searches import SEARCHES
from fedray.config.tables import OPTIONS
from fedray.config.trees import CHOICES, Tree
from fedray.config.tune_config import VERBS, TuneConfig
from fedray.costs.devices import DEVICES
from fedray.costs.links import LINKS
from fedray.data import DATASETS
from fedray.federation.method import Method
from fedray.methods import METHODS
from fedray.models import MODELS
from fedray.storage import run_files
from rllib_pruner.config import TrainConfig

FOLDER = Path(__file__).parent
TUNE_CHOICES = ("scheduler", "search")
"""Keys of `tune` that choose an entry of a table."""
LARGE = 2**53
"""The page leaves out larger bounds: they are limits of the machine's numbers."""

HEAD = """# Every key of a config

<!-- Written by `make docs` from the docstrings; edit those. -->

A file holds the config of one run, or `base:` with such a config, `space:` with the points of a sweep, and
`tune:` with how they are tried. Every key has a default. A command-line argument writes a key with dots:
`fedray run x.yaml clients.cohort=20 method.lr=0.1`. Values are YAML 1.2.

Editors complete and check a file that names a schema in a comment. [`config.schema.json`](config.schema.json)
knows the tables that come with fedray; for a file in `tune_configs/`:

    # yaml-language-server: $schema=../docs/config.schema.json

`fedray schema --import mine.py > mine.schema.json` writes one that also knows the methods, models, devices, …
of a file ([bring_your_own.md](bring_your_own.md)).
"""

SPACE = """
## `space`

A key with dots → one verb and its list, e.g. `method.lr: {loguniform: [0.01, 1]}`. Grids are combined with
each other; the other verbs are drawn `tune.num_samples` times for each combination, by `tune.seed`. All
points are drawn and checked before any process starts. `tune.search` finds points in other ways
([sweeps.md](sweeps.md)).
"""

SWEEP_FILES = {
    "sweep.yaml": "the base, the drawn points and `tune`, with a checksum",
    "best.yaml": "the config of the best point by the mean over its seeds, as `fedray run` takes it",
    "pareto.json": "the Pareto set of a sweep with `tune.objectives`: trials, changes, means and intervals",
    "points.jsonl": "of a sweep that searches: each suggested point and each result the searcher was told",
    "best.json": "its trials and final metrics, means over its seeds",
    "trials/<point>/": "the directory of a run, for each point",
    "judged.jsonl": "the reports that the scheduler judged, in their order; `resume` judges them again",
    "perturbed.jsonl": "PBT's perturbations: after which round, and which trial continues from which",
    "spent.json": "seconds that the trials have run, where there is a time budget",
    "trials/<point>/stopped.json": "the scheduler stopped the trial after this round",
    "trials/<point>/lineage.jsonl": "PBT's forks: round, parent, changed options, own costs before",
    "trials/<point>/before-…/": "the trial's own rounds and checkpoints before a fork",
    "trials/<point>/error.txt": "why the trial failed, with its traceback",
    "report/": "figures (PNG, SVG, PDF), `table.md` and `table.csv`; `fedray report` writes them anew",
}


def config_page() -> str:
    """Return docs/config.md."""
    parts = [
        HEAD,
        *_sections(),
        *_choices(),
        _methods(),
        _tables_of_names(),
        _devices(),
        SPACE,
        _table(("verb", "draws"), ((f"`{verb}`", text) for verb, text in VERBS.items())),
        _section("tune", TuneConfig, _tune_defaults()),
        _choice("tune.scheduler", "name", SCHEDULERS),
        _choice("tune.search", "name", SEARCHES),
        _files(),
    ]
    return "\n".join(part.strip("\n") + "\n" for part in parts)


def written() -> dict[str, str]:
    """Return path from docs/ → text of every file that is generated."""
    return {
        "config.md": config_page(),
        "config.schema.json": json.dumps(file_schema(), indent=1, ensure_ascii=False) + "\n",
        "training.schema.json": json.dumps(file_schema(TrainConfig), indent=1, ensure_ascii=False) + "\n",
        "../fedray/methods/listing.json": json.dumps(listing(), indent=1, ensure_ascii=False) + "\n",
        **{relpath(page, FOLDER): with_tables(page.read_text(encoding="utf-8")) for page in pages()},
    }


# ── sections
# ──────────────────────────────────────────────────────────────────────────────────────────


def _sections() -> Iterator[str]:
    defaults = RunConfig().to_tree()
    defaults["tracking"]["uri"] = "sqlite:///runs/mlflow.db"
    models = RunConfig.model_fields
    yield _section("", RunConfig, defaults)
    for name in ("data", "clients"):
        yield _section(name, models[name].annotation, defaults[name])
    resources = models["clients"].annotation.model_fields["resources"].annotation  # type: ignore[union-attr]
    yield _section("clients.resources", resources, defaults["clients"]["resources"])
    yield _section("train", models["train"].annotation, defaults["train"])
    yield _section("tracking", models["tracking"].annotation, defaults["tracking"])


def _section(name: str, model: Any, defaults: Tree) -> str:
    schema = model.model_json_schema()
    schema = _resolved({"$ref": schema["$ref"]}, schema) if "$ref" in schema else schema
    title = f"## `{name}`" if name else "## A run"
    prefix = f"{name}." if name else ""
    rows = [
        (f"`{prefix}{key}`", _type(part), _default(defaults.get(key)), _sentence(part.get("description", "")))
        for key, part in schema["properties"].items()
        if not _is_section(part)
    ]
    return f"\n{title}\n\n{_about(model)}\n\n{_table(('key', 'type', 'default', 'what it does'), rows)}"


def _about(model: type) -> str:
    text = summary(model)
    return _sentence(text.partition(":` ")[2] if text.startswith("`") else text)


def _is_section(part: Tree) -> bool:
    return "$ref" in part or "allOf" in part


# ── choices
# ──────────────────────────────────────────────────────────────────────────────────────────


def _choices() -> Iterator[str]:
    for section, table in OPTIONS.items():
        if section != "method":
            yield _choice(section, CHOICES[section], table)


def _choice(section: str, key: str, table: Mapping[str, type]) -> str:
    rows = [row for name, kind in table.items() for row in _entry(section, name, kind)]
    heads = ("name, options", "type", "default", "what it does")
    text = f"`{section}.{key}` chooses one of these; the other keys are its options."
    return f"\n## `{section}`\n\n{text}\n\n{_table(heads, rows)}"


def _tune_defaults() -> Tree:
    """Return the defaults of `tune`; a choice by its name alone."""
    tree = TuneConfig().to_tree()
    return {key: value["name"] if key in TUNE_CHOICES else value for key, value in tree.items()}


def _entry(section: str, name: str, kind: type) -> Iterator[Sequence[str]]:
    yield f"**`{name}`**", "", "", _sentence(summary(kind))
    yield from _options(section, kind, skip=frozenset())


def _options(section: str, kind: type, skip: frozenset[str]) -> Iterator[Sequence[str]]:
    schema = TypeAdapter(kind).json_schema()
    for key, part in described(schema.get("properties", {}), kind).items():
        if key not in skip:
            part = _resolved(part, schema)
            text = _sentence(part.get("description", ""))
            yield f"`{section}.{key}`", _type(part), _default(part.get("default")), text


def _methods() -> str:
    heads = ("key", "type", "default", "what it does")
    shared = frozenset(option.name for option in fields(Method))
    text = "\n## `method`\n\n`method.name` chooses one of the methods below. Every method has:\n\n"
    text += _table(heads, _options("method", Method, skip=frozenset()))
    for name, kind in METHODS.items():
        rows = list(_options("method", kind, skip=shared))
        text += f"\n\n### [`{name}`](methods/{name}.md)\n\n{_sentence(summary(kind))}"
        text += f"\n\n{_table(heads, rows)}" if rows else ""
    return text


def _tables_of_names() -> str:
    models = ((f"`{name}`", _sentence(model.summary), model.source) for name, model in MODELS.items())
    data = (
        (
            f"`{name}`",
            "×".join(map(str, spec.input_shape)),
            f"{spec.train_examples:,} + {spec.test_examples:,}"
            if spec.train_examples
            else "as the files have",
            str(spec.num_classes),
            spec.files or "embedded in a library",
        )
        for name, spec in DATASETS.items()
    )
    return (
        f"\n## `model`\n\n{_table(('name', 'layers', 'source'), models)}\n\n## `data.name`\n\n"
        f"{_table(('name', 'shape', 'examples: train + test', 'classes', '`data.root` holds'), data)}"
    )


def _devices() -> str:
    devices = (
        (
            f"`{name}`",
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
        for name, device in DEVICES.items()
    )
    links = (
        (
            f"`{name}`",
            f"{link.downlink_bytes_per_s / 1e6:,.3g}",
            f"{link.uplink_bytes_per_s / 1e6:,.3g}",
            f"{link.latency_s:.3g}",
            f"{1e6 * link.down_j_per_byte:.3g}",
            f"{1e6 * link.up_j_per_byte:.3g}",
        )
        for name, link in LINKS.items()
    )
    of_links = ("link", "down MB/s", "up MB/s", "latency s", "J/MB down", "J/MB up")
    heads = (
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
    return (
        "\n## `clients.devices`\n\nName → weight, e.g. `{phone: 0.6, raspberry_pi_4@lte: 0.4}`: a device on "
        "its usual link, or on another one. `fedray devices` and [costs.md](costs.md) give the source of "
        "each number.\n\n"
        f"{_table(heads, devices)}\n\n{_table(of_links, links)}"
    )


# ── files
# ──────────────────────────────────────────────────────────────────────────────────────────


def _files() -> str:
    lines = (run_files.__doc__ or "").splitlines()
    pairs = [line.strip().split("  ", 1) for line in lines if line.startswith("    ")]
    run = [(f"`{name.strip()}`", _sentence(text)) for name, text in pairs]
    sweep = [(f"`{name}`", _sentence(text)) for name, text in SWEEP_FILES.items()]
    return (
        f"\n## The files of a run\n\n{_table(('file', 'holds'), run)}\n\n"
        f"## The files of a sweep\n\n{_table(('file', 'holds'), sweep)}"
    )


# ── words
# ──────────────────────────────────────────────────────────────────────────────────────────


def _resolved(part: Mapping[str, Any], root: Mapping[str, Any]) -> Tree:
    if "$ref" not in part:
        return dict(part)
    target: Any = root
    for step in part["$ref"].removeprefix("#/").split("/"):
        target = target[step]
    return {**target, **{key: value for key, value in part.items() if key != "$ref"}}


def _type(part: Mapping[str, Any]) -> str:
    if "anyOf" in part:
        return " or ".join(_type(inner) for inner in part["anyOf"])
    if "enum" in part:
        return " · ".join(f"`{value}`" for value in part["enum"])
    if "const" in part:
        return f"`{part['const']}`"
    kind = part.get("type")
    if kind == "array":
        return f"list of {_type(part.get('items', {}))}"
    if kind == "object":
        values = part.get("additionalProperties", {})
        return f"name → {'value' if values is True else _type(values)}"
    words = {
        "integer": "whole number",
        "number": "number",
        "boolean": "`true` · `false`",
        "string": "path" if part.get("format") == "path" else "text",
        "null": "`null`",
    }
    return f"{words.get(str(kind), 'section')}{_range(part)}"


def _range(part: Mapping[str, Any]) -> str:
    if part.get("type") == "integer" and part.get("exclusiveMinimum") == 0:
        part = {**part, "minimum": 1, "exclusiveMinimum": None}
    signs = {"minimum": "≥", "exclusiveMinimum": ">", "maximum": "≤", "exclusiveMaximum": "<"}
    bounds = [
        f"{sign} {part[key]:,}".removesuffix(".0")
        for key, sign in signs.items()
        if part.get(key) is not None and abs(part[key]) < LARGE
    ]
    return f" {', '.join(bounds)}" if bounds else ""


def _default(value: Any) -> str:
    return f"`{json.dumps(value, ensure_ascii=False)}`" if not isinstance(value, str) else f"`{value}`"


def _sentence(text: str) -> str:
    """Return a description with a capital first letter and a full stop, as a cell of a table."""
    text = text.strip().replace("|", "\\|")
    if not text:
        return ""
    text = text[0].upper() + text[1:]
    return text if text.endswith((".", "!", "?", ":")) else f"{text}."


def _table(heads: Sequence[str], rows: Any) -> str:
    lines = [f"| {' | '.join(heads)} |", f"|{' --- |' * len(heads)}"]
    return "\n".join([*lines, *(f"| {' | '.join(row)} |" for row in rows)])


if __name__ == "__main__":
    for name, text in written().items():
        (FOLDER / name).write_text(text, encoding="utf-8")
