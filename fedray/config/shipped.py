"""The configs and examples that come with the package: found by name, listed, and copied by `fedray new`.

In a wheel they lie in `fedray/shipped`; in a checkout they are the repository's own folders.
"""

import logging
import re
from collections.abc import Iterable
from functools import cache
from pathlib import Path
from textwrap import shorten

from fedray.errors import ConfigError, unknown

logger = logging.getLogger(__name__)

CONFIGS = "tune_configs"
FOLDERS = (CONFIGS, "examples")
WIDTH = 110  # characters of a summary
_SCHEMA = re.compile(r"\$schema=\.\./docs/(\S+)")


def _root() -> Path:
    package = Path(__file__).parents[1]
    return package / "shipped" if (package / "shipped").is_dir() else package.parent


def located(given: str | Path) -> Path:
    """Return a path; if no such file is here, that of the shipped file of this name, and say so.

    Only names as the documentation writes them, `tune_configs/NAME.yaml` and `examples/NAME.py`, are found.
    """
    path = Path(given)
    if path.is_absolute() or len(path.parts) != 2 or path.parts[0] not in FOLDERS or path.exists():
        return path
    there = _root() / path
    if not there.is_file():
        return path
    _say(str(path))
    return there


def hint(given: str | Path) -> str:
    """Return how to get a shipped config whose name a missing file has; empty if there is none."""
    path = Path(given)
    if path.exists() or path.stem not in templates():
        return ""
    return (
        f"; fedray comes with {CONFIGS}/{path.stem}.yaml: `fedray new DIR --template {path.stem}` copies it"
    )


@cache
def _say(name: str) -> None:
    """Say, once in a process, that a shipped file is used."""
    copy = f"; `fedray new DIR --template {Path(name).stem}` copies it" if name.startswith(CONFIGS) else ""
    logger.warning("no %s here: using the one that comes with fedray%s", name, copy)


def templates() -> dict[str, Path]:
    """Return name → file of each shipped config."""
    return {path.stem: path for path in sorted((_root() / CONFIGS).glob("*.yaml"))}


def summary(path: Path) -> str:
    """Return the first sentence of a config's leading comment, without its commands, shortened to WIDTH."""
    lines = [line[1:].strip() for line in _comments(path.read_text(encoding="utf-8").splitlines())]
    text = " ".join(line for line in lines if not line.startswith(("fedray ", "yaml-language-server")))
    sentence = re.split(r"(?<=[a-z0-9)])[.](?: |$)", text.strip(), maxsplit=1)[0]
    return shorten(sentence, WIDTH, placeholder=" …")


def _comments(lines: Iterable[str]) -> Iterable[str]:
    for line in lines:
        if not line.startswith("#"):
            return
        yield line


def write_template(folder: Path, name: str) -> tuple[Path, ...]:
    """Copy a shipped config, and the JSON schema by which editors complete it, into an empty or new folder.

    Its commands name the copy. The first path returned is the config.

    Raises:
        ConfigError: if there is no such template, or the folder is not empty or cannot be written.
    """
    known = templates()
    if name not in known:
        raise ConfigError(f"--template: {unknown('template', name, known)}")
    text = known[name].read_text(encoding="utf-8")
    schemas = _SCHEMA.findall(text)
    contents = {f"{name}.yaml": _SCHEMA.sub(r"$schema=\1", text.replace(f"{CONFIGS}/", ""))}
    contents |= {schema: (_root() / "docs" / schema).read_text(encoding="utf-8") for schema in schemas}
    try:
        if folder.exists() and (not folder.is_dir() or any(folder.iterdir())):
            what = "is not empty" if folder.is_dir() else "is a file"
            raise ConfigError(
                f"{folder} {what}: `fedray new` needs an empty or new folder; choose another one"
            )
        folder.mkdir(parents=True, exist_ok=True)
        for file, content in contents.items():
            (folder / file).write_text(content, encoding="utf-8")
    except OSError as error:
        raise ConfigError(f"{folder}: cannot be written: {error.strerror or error}") from None
    return tuple(folder / file for file in contents)
