"""Methods, models and data sets from outside the package: a Python file that adds to the tables.

The file is imported by its path; whoever starts workers pickles what it defines by value
(`imported_modules`), since they could not import it by name.
"""

import sys
from collections.abc import Iterable
from hashlib import sha256
from importlib.util import module_from_spec, spec_from_file_location
from pathlib import Path
from types import ModuleType

from fedray.errors import ConfigError

_imported: dict[Path, ModuleType] = {}


def import_modules(paths: Iterable[str | Path]) -> None:
    """Import Python files, each once per process.

    Raises:
        ConfigError: if a file is missing or raises.
    """
    for given in paths:
        try:
            path = Path(given).expanduser().resolve()
            exists = path in _imported or path.is_file()
        except (OSError, RuntimeError, ValueError) as error:
            raise ConfigError(f"imports: {str(given)!r} is not the name of a file: {error}") from None
        if not exists:
            raise ConfigError(f"imports: no file {str(given)!r} (looked for {path})")
        if path not in _imported:
            _imported[path] = _import(path, given)


def imported_modules() -> tuple[ModuleType, ...]:
    """Return the modules that were imported so far."""
    return tuple(_imported.values())


def _import(path: Path, given: str | Path) -> ModuleType:
    name = f"fedray_import_{path.stem}_{sha256(str(path).encode()).hexdigest()[:8]}"
    spec = spec_from_file_location(name, path)
    if spec is None or spec.loader is None:
        raise ConfigError(f"imports: {given} is not a Python file")
    module = module_from_spec(spec)
    sys.modules[name] = module  # dataclasses and pickle look a class's module up
    try:
        spec.loader.exec_module(module)
    except Exception as error:
        del sys.modules[name]
        raise ConfigError(f"imports: {given} raised {type(error).__name__}: {error}") from error
    return module
