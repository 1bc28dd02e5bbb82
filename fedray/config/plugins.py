"""Methods, models, devices, … from outside the package: a Python file that adds to the tables.

    import_modules(paths)     in the process that reads a config
    take_over(sources())      in a worker process: the same text under the same names

The file is imported by its path, modules of its folder by their names. A worker runs the text that the first
process read: it needs no file, and later trials of a sweep do not see an edit. Objects of these modules are
pickled by name, like all others. `files_of` finds a module that Python code imported by the entries that it
added to the tables, and its file is recorded like a given one.
"""

import ast
import sys
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, fields, is_dataclass
from hashlib import sha256
from importlib import import_module, invalidate_caches
from importlib.abc import InspectLoader, MetaPathFinder
from importlib.machinery import ModuleSpec, PathFinder
from importlib.util import decode_source, module_from_spec, spec_from_file_location
from pathlib import Path
from types import ModuleType
from typing import Any

from fedray.errors import ConfigError

OURS = frozenset({"fedray", "rllib_pruner"})
INSTALLED = frozenset({"site-packages", "dist-packages"})


@dataclass(frozen=True)
class Source:
    """The text of a module when it was imported.

    Args:
        name: of the module.
        path: of its file.
        text: of its file.
        given: whether `imports` names the file; otherwise it is in the folder of one that is named.
    """

    name: str
    path: Path
    text: bytes
    given: bool


_sources: dict[str, Source] = {}
_imported: dict[Path, ModuleType] = {}
_beside: dict[str, ModuleType] = {}
_adopted: dict[Path, ModuleType] = {}


def import_modules(paths: Iterable[str | Path]) -> None:
    """Import Python files, each once per process; a file that Python imported already is not run again.

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
        if path not in _imported and not _adopt(path):
            _imported[path] = _import(path, given)


def is_imported(path: Path) -> bool:
    """Tell whether this process has run a file already, by its path or by its name."""
    return path in _imported or _adopt(path)


def imported_modules() -> tuple[ModuleType, ...]:
    """Return the imported modules of `imports:` files and of their folders."""
    return (*_imported.values(), *_beside.values())


def sources() -> tuple[Source, ...]:
    """Return the sources of `imported_modules`."""
    return tuple(_sources.values())


def take_over(sources: Sequence[Source]) -> None:
    """Import the modules that another process imported, from the texts that it read.

    Raises:
        ConfigError: if a file raises.
    """
    new = [source for source in sources if source.name not in _sources]
    _sources.update({source.name: source for source in new})
    if _SENT not in sys.meta_path:
        sys.meta_path.insert(0, _SENT)
    for source in new:
        if source.given:
            _imported[source.path] = _imported_from(source)
        if str(source.path.parent) not in sys.path:
            sys.path.append(str(source.path.parent))  # for imports inside functions


class _Sent(InspectLoader, MetaPathFinder):
    """Finds the received modules by name: those in the folder of a file of `imports`, and its package."""

    def find_spec(self, name: str, path: object = None, target: object = None) -> ModuleSpec | None:
        """Return how to import a module whose text was received."""
        if name not in _sources:
            return None
        file = _sources[name].path
        inner = [str(file.parent)] if file.name == "__init__.py" else None
        return spec_from_file_location(name, file, loader=self, submodule_search_locations=inner)

    def get_source(self, fullname: str) -> str:
        """Return the text of a module."""
        return decode_source(_sources[fullname].text)


_SENT = _Sent()


def modules_called(stem: str) -> list[ModuleType]:
    """Return the modules, imported by path or recorded, whose file has this name without `.py`."""
    return [module for path, module in {**_adopted, **_imported}.items() if path.stem == stem]


# ── files of modules that Python code imported
# ────────────────────────────────────────────────────────────────────────────────────────────


def files_of(entries: Iterable[Any]) -> list[Path]:
    """Return the files outside the package that define entries of tables, each once."""
    found: list[Path] = []
    for entry in entries:
        module = home(entry)
        file = _file(module) if module is not None and module.__name__ != "__main__" else None
        if file is None or module is None:
            continue
        if module not in imported_modules():
            _adopted[file] = module
        if module not in _beside.values():  # else the file that imported it is recorded
            found.append(file)
    return list(dict.fromkeys(found))


def unrecorded(entries: Mapping[str, Any]) -> dict[str, str]:
    """Return key → module of the entries whose module `imports` cannot name: a script, or no file."""
    modules = {key: home(entry) for key, entry in entries.items()}
    return {
        key: f"{module.__name__} ({getattr(module, '__file__', None) or 'no file'})"
        for key, module in modules.items()
        if module is not None and (module.__name__ == "__main__" or _file(module) is None)
    }


def home(entry: Any) -> ModuleType | None:
    """Return the module outside the package that defines an entry of a table, or None.

    An entry that is no class belongs to the module of the functions in its fields, unless that is installed.
    """
    if isinstance(entry, type):
        return _outside(entry)
    parts = [getattr(entry, f.name) for f in fields(entry)] if is_dataclass(entry) else []
    modules = [_outside(getattr(part, "func", part)) for part in parts if callable(part)]
    own = [m for m in modules if m is not None and not _is_installed(_file(m))]
    return own[0] if own else None


def _outside(thing: Any) -> ModuleType | None:
    name = getattr(thing, "__module__", None) or ""
    return None if name.partition(".")[0] in OURS else sys.modules.get(name)


def _is_installed(file: Path | None) -> bool:
    return file is not None and (
        bool(INSTALLED.intersection(file.parts)) or file.is_relative_to(Path(ast.__file__).parent)
    )


def _file(module: ModuleType) -> Path | None:
    name = getattr(module, "__file__", None)
    path = Path(name).resolve() if name else None
    return path if path is not None and path.suffix == ".py" and path.is_file() else None


def _adopt(path: Path) -> bool:
    """Whether Python has imported the file by name."""
    if path in _adopted:
        return True
    for name, module in list(sys.modules.items()):
        same = getattr(module, "__file__", None) and Path(str(module.__file__)).name == path.name
        by_name = name not in ("__main__", "__mp_main__") and not name.startswith("fedray_import_")
        if same and by_name and _file(module) == path:
            _adopted[path] = module
            return True
    return False


# ── files that are imported by path
# ────────────────────────────────────────────────────────────────────────────────────────────


def _import(path: Path, given: str | Path) -> ModuleType:
    try:
        text = path.read_bytes()
        code = ast.parse(text, filename=str(path))
    except (SyntaxError, ValueError) as error:
        raise ConfigError(f"imports: {given} raised {type(error).__name__}: {error}") from error
    name, folder = f"fedray_import_{path.stem}_{sha256(str(path).encode()).hexdigest()[:8]}", path.parent
    if any(isinstance(node, ast.ImportFrom) and node.level for node in ast.walk(code)):
        name, folder = _in_package(path)
    else:
        _check_hidden(_names_beside(code, path), path, given)
    if str(folder) not in sys.path:
        sys.path.append(str(folder))  # last: installed modules come first
    invalidate_caches()
    before = set(sys.modules)
    source = Source(name, path, text, given=True)
    module = _imported_from(source, given)
    for other in set(sys.modules) - before - {name}:
        file = _file(sys.modules[other])
        if file is not None and file.is_relative_to(folder) and not _is_installed(file) and _foreign(other):
            _beside[other] = sys.modules[other]
            _sources[other] = Source(other, file, file.read_bytes(), given=False)
    _sources[name] = source
    return module


def _imported_from(source: Source, given: str | Path | None = None) -> ModuleType:
    """Import a file of `imports`, by name if it is one of a package.

    Raises:
        ConfigError: if it raises.
    """
    given = source.path if given is None else given
    try:
        return import_module(source.name) if "." in source.name else _executed(source, given)
    except ConfigError:
        raise
    except Exception as error:
        raise ConfigError(f"imports: {given} raised {type(error).__name__}: {error}") from error


def _executed(source: Source, given: str | Path) -> ModuleType:
    spec = spec_from_file_location(source.name, source.path)
    if spec is None or spec.loader is None:
        raise ConfigError(f"imports: {given} is not a Python file")
    module = module_from_spec(spec)
    sys.modules[source.name] = module  # dataclasses and pickle look a class's module up
    try:
        exec(compile(source.text, str(source.path), "exec", dont_inherit=True), module.__dict__)
    except BaseException:
        del sys.modules[source.name]
        raise
    return module


def _foreign(name: str) -> bool:
    return name.partition(".")[0] not in OURS


def _in_package(path: Path) -> tuple[str, Path]:
    """Return the dotted name of a file in a package, and the folder that holds the package."""
    folder, parts = path.parent, [path.stem]
    while (folder / "__init__.py").is_file():
        parts.insert(0, folder.name)
        folder = folder.parent
    return ".".join(parts), folder


def _names_beside(code: ast.Module, path: Path) -> set[str]:
    """Return the names that a file imports and that lie beside it."""
    names = set[str]()
    for node in ast.walk(code):
        if isinstance(node, ast.Import):
            names |= {alias.name.partition(".")[0] for alias in node.names}
        elif isinstance(node, ast.ImportFrom) and node.module:
            names.add(node.module.partition(".")[0])
    places = {name: (path.parent / f"{name}.py", path.parent / name / "__init__.py") for name in names - OURS}
    return {name for name, files in places.items() if any(file.is_file() for file in files)}


def _check_hidden(names: set[str], path: Path, given: str | Path) -> None:
    """Refuse a module of the file's folder if Python would import another one of its name."""
    for name in sorted(names - sys.stdlib_module_names):
        loaded = sys.modules.get(name)
        spec = loaded.__spec__ if loaded is not None else PathFinder.find_spec(name)
        origin = getattr(loaded, "__file__", None) or (spec.origin if spec is not None else None)
        if origin and not Path(origin).resolve().is_relative_to(path.parent):
            raise ConfigError(
                f"imports: {given} imports {name}, which lies in its folder, but Python finds {origin} under "
                "that name; rename the one in the folder"
            )
