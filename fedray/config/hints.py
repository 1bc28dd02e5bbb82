"""Hints in messages: our keys for the words of other tools, and our notation for values in others."""

import re
from collections.abc import Callable, Iterable, Mapping
from dataclasses import dataclass, fields
from typing import Any

from fedray.config.tables import OPTIONS, TABLES
from fedray.errors import nearest


@dataclass(frozen=True)
class Meant:
    """Our key for a word of other tools.

    Args:
        key: dotted key.
        rule: how to convert the value; empty if the values are equal.
        value: converts a number of theirs to ours.
    """

    key: str
    rule: str = ""
    value: Callable[[float], float] | None = None


_SPARSITY = Meant("method.density", "density = 1 − sparsity", lambda share: 1 - share)
_PRUNED = Meant("method.density", "density = 1 − the pruned share", lambda share: 1 - share)
_SHARE = Meant("clients.cohort", "a number of clients: share × clients.population")
_EPOCHS = Meant("method.local_epochs", "of a client in a round; rounds says how many rounds")
_STEPS = Meant("method.steps", "in place of epochs")
_DEVICE = Meant(
    "clients.devices",
    "the simulated devices; for a GPU of this machine set clients.resources.gpu=1",
)
_PAIR = re.compile(r"([\w./]+)(?::|=|(?=[<>]=))([^@]+)")
"""A key and a value in one word; not a login."""
_PERCENT = re.compile(r"([-+]?[\d.]+) ?%")

_WORDS: dict[Meant, str] = {
    _SPARSITY: "sparsity target_sparsity final_sparsity sparsity_ratio",
    _PRUNED: "pruning_rate prune_rate pruning_ratio prune_ratio prune_fraction pruning_amount compression",
    Meant("method.density"): "keep_ratio keep_fraction remaining target_density final_density",
    Meant("method.lr"): "learning_rate learningrate eta step_size client_lr local_lr base_lr initial_lr",
    Meant("method.lr_decay"): "learning_rate_decay decay gamma",
    Meant("method.batch_size"): "batch batches bs batchsize local_bs local_batch_size train_batch_size",
    Meant("method.weight_decay"): "wd l2 weightdecay",
    Meant("method.optimizer"): "optim optimiser",
    Meant("method.name"): "algorithm algo strategy aggregator method_name fl_method pruner",
    Meant("method.uplink_values"): "quantization quantisation quantize compress_uplink upload_dtype",
    Meant("clients.uplink.name"): "compressor compression_method codec sparsification error_feedback",
    Meant("clients.sampler.name"): "client_selection client_sampler selection sampling",
    _EPOCHS: "epochs epoch num_epochs n_epochs local_ep local_epoch client_epochs max_epochs",
    _STEPS: "local_steps num_steps local_iterations local_updates iterations",
    Meant("rounds"): "num_rounds n_rounds communication_rounds comm_rounds comm_round global_rounds "
    "global_epochs max_rounds total_rounds server_rounds round",
    Meant("seed"): "random_seed manual_seed random_state rng_seed",
    Meant("model"): "arch architecture net network model_name backbone",
    Meant("eval_every"): "test_every eval_interval eval_freq evaluate_every evaluation_interval",
    Meant("checkpoint_every"): "save_every save_interval checkpoint_interval checkpoint_freq save_freq",
    Meant("imports"): "import plugins plugin",
    Meant("data.name"): "dataset data_set dataset_name",
    Meant("data.root"): "data_dir data_path datadir dataset_path data_root",
    Meant("data.partition.kind"): "split distribution partitioning partitioner partition_method",
    Meant(
        "data.partition.alpha", "with data.partition.kind=dirichlet"
    ): "dirichlet_alpha alpha beta concentration",
    Meant("data.validation_fraction"): "val_fraction val_split val_ratio validation_split valid_fraction",
    Meant("clients.population"): "num_clients n_clients total_clients number_of_clients num_users n_users "
    "clients_total num_supernodes",
    Meant(
        "clients.cohort"
    ): "clients_per_round cohort_size num_clients_per_round sampled_clients participants "
    "num_participants min_fit_clients client_num_per_round",
    _SHARE: "fraction_fit participation participation_rate client_fraction sample_fraction frac "
    "sampling_rate",
    Meant("clients.actors"): "workers num_workers n_jobs num_actors processes num_processes parallel",
    Meant("clients.resources.gpu"): "gpu gpus num_gpus use_gpu cuda use_cuda n_gpus",
    Meant("clients.resources.cpu"): "cpu cpus num_cpus",
    _DEVICE: "device",
    Meant("clients.deadline_s", "in seconds"): "timeout deadline round_timeout",
    Meant("clients.dropout"): "dropout_rate drop_rate client_dropout failure_rate straggler_rate",
    Meant("storage"): "storage_path storage_uri upload_dir local_dir results_dir output_dir save_dir log_dir",
    Meant("tracking.uri"): "mlflow tracking_uri mlflow_uri mlflow_tracking_uri logger",
    Meant("tracking.experiment"): "experiment experiment_name project project_name",
}
WORDS: Mapping[str, Meant] = {word: meant for meant, words in _WORDS.items() for word in words.split()}
"""Word of other tools, in lower case with `_` → our key."""


def for_key(key: str, value: Any, known: Iterable[str], section: str) -> str:
    """Return a hint for an unknown key, which ends the sentence: `; did you mean …?` or a full stop.

    Args:
        key: the given dotted key.
        value: the given value.
        known: all dotted keys of the config.
        section: dotted key of the section with the unknown key; empty at the top.
    """
    known = list(dict.fromkeys(known))
    last = key.rpartition(".")[2]
    here = section and f"{section}."
    own = [name.removeprefix(here) for name in known if name.startswith(here)]
    own = [name for name in own if "." not in name]
    elsewhere = [name for name in known if name.rpartition(".")[2] == last and name != last]
    if len(elsewhere) == 1:
        return f"; did you mean {elsewhere[0]!r}?"
    meant = WORDS.get(re.sub(r"[\s-]", "_", last.strip().lower()))
    if meant is not None and meant.key in known:
        return f"; did you mean {meant.key!r}{_rule(meant, value)}?"
    return nearest(last, own)


def _rule(meant: Meant, value: Any) -> str:
    if meant is _EPOCHS and isinstance(value, float):
        return f" ({meant.rule}), or, for part of an epoch, 'method.steps'"
    if meant.value is not None and isinstance(value, int | float) and 0 <= value <= 1:
        return f" ({meant.rule}: {meant.key}={meant.value(value):.6g})"
    return f" ({meant.rule})" if meant.rule else ""


def for_value(key: str, value: Any, kind: str) -> str:
    """Return a hint for a value of the wrong kind, `; …` without a full stop, or nothing.

    Args:
        key: dotted key.
        value: the given value.
        kind: pydantic's name of the problem.
    """
    if key in TABLES:
        return f"; known: {', '.join(sorted(TABLES[key]))}"
    if key == "method.local_epochs" and isinstance(value, float):
        return "; for part of an epoch set method.steps, e.g. method.steps=10"
    if kind.startswith(("dict", "mapping", "model")):
        text = value[0] if isinstance(value, list) and len(value) == 1 else value
        pair = _PAIR.fullmatch(text) if isinstance(text, str) else None
        return f"; write {key}={{{pair[1]}: {pair[2]}}}" if pair else ""
    if kind.startswith("bool"):
        meant = {"yes": "true", "on": "true", "1": "true", "no": "false", "off": "false", "0": "false"}
        word = meant.get(str(value).lower())
        return f"; write {key}={word}" if word and not isinstance(value, bool) else ""
    if kind.startswith(("int", "float")):
        number = _number(value, whole=kind.startswith("int"))
        return f"; write {key}={number}" if number else ""
    return ""


def _number(value: Any, *, whole: bool) -> str:
    """Return a number of another notation in that of YAML 1.2, or nothing if the value is no number."""
    found: float | None = None
    if isinstance(value, float):
        found = value
    elif isinstance(value, str):
        found = _read(value.strip())
    if found is None or not abs(found) < 2**63 or (whole and found != int(found)):
        return ""
    return str(int(found)) if found == int(found) else f"{found:.12g}"


def _read(text: str) -> float | None:
    if re.fullmatch(r"\d+(:[0-5]?\d)+(\.\d*)?", text):  # base 60, as YAML 1.1 has it
        *above, last = text.split(":")
        total = 0
        for part in above:
            total = total * 60 + int(part)
        return total * 60 + float(last)
    share = _PERCENT.fullmatch(text)
    try:
        if share:
            return float(share[1]) / 100
        return float(text.replace("_", "").replace(",", "")) if re.fullmatch(r"[-+\d_.,eE]+", text) else None
    except ValueError:
        return None


def option_keys() -> list[str]:
    """Return the dotted keys of all options of all entries of the tables, e.g. of all methods."""
    return [
        f"{section}.{option.name}"
        for section, table in OPTIONS.items()
        for kind in table.values()
        for option in fields(kind)
    ]
