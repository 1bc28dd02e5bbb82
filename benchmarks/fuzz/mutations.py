"""Changes of bytes, of text and of nested values, each from a generator alone."""

import copy
from collections.abc import Sequence
from contextlib import suppress
from random import Random
from typing import Any

INTEGERS = (
    0,
    1,
    2,
    0x7F,
    0x80,
    0xFF,
    0x7FFF,
    0xFFFF,
    2**31 - 1,
    2**31,
    2**32 - 1,
    2**63 - 1,
    2**63,
    2**64 - 1,
)
"""Numbers at which a length or an index overflows."""

TOKENS = (
    *(
        "{",
        "}",
        "[",
        "]",
        ":",
        ": ",
        ",",
        "&a ",
        "*a",
        "<<: *a",
        "|",
        ">",
        "!!int ",
        "!!python/object:os.system ",
    ),
    *(
        "- ",
        "#",
        "'",
        '"',
        "\n",
        "\t",
        "\0",
        "? ",
        "---\n",
        "%YAML 1.1\n",
        "\ufeff",
        "é",
        "\u2028",
        "~",
        ".nan",
    ),
    *(
        "-.inf",
        "1e999",
        "0x",
        "0o8",
        "null",
        "true",
        "=",
        "@",
        "..",
        "/",
        "\\",
        "$",
        "𝒳",
        "\ud83d",
        "9" * 400,
    ),
)
"""Pieces of YAML, JSON and paths that mean something to a reader."""

VALUES: tuple[Any, ...] = (
    *(None, True, False, 0, 1, -1, 2, 3, 2**31, 2**63, -(2**63) - 1, 2**200, 10**400),
    *(0.0, -0.0, 0.5, 1e-320, 1e308, -1e308, float("inf"), float("-inf"), float("nan")),
    *(
        "",
        " ",
        "none",
        "null",
        "x",
        "fedavg",
        "snip",
        "auto",
        "0.1",
        "1e3",
        "a.b",
        "../..",
        "/dev/null",
        "~",
        "\0",
    ),
    *(
        "\ud800",
        "é" * 50,
        "x" * 5000,
        "http://me:pw@host",
        "sqlite:///",
        [],
        {},
        [[]],
        [{}],
        {"": None},
        [1, 2, 3],
    ),
    *(
        {"name": "snip"},
        {"grid": [1, 2]},
        {"a": {"b": {"c": 1}}},
        ["a", 1, None],
        {"name": None},
        {"uniform": [0, 1]},
    ),
)
"""Values of every type that a config, a checkpoint or a result may hold, and of some that none may."""


def bytes_of(random: Random, seeds: Sequence[bytes]) -> bytes:
    """Return one of the seeds with one to four changes; seldom none, or bytes of its own."""
    if random.random() < 0.02:
        return random.randbytes(random.randrange(300))
    data = bytearray(random.choice(seeds))
    for _ in range(random.choice((0, 1, 1, 1, 2, 2, 3, 4))):
        _change(random, data, seeds)
    return bytes(data)


def _change(random: Random, data: bytearray, seeds: Sequence[bytes]) -> None:
    """Change bytes in place; half of the changes are near the beginning, where the headers are."""
    size = len(data)
    at = random.randrange(size + 1) if random.random() < 0.5 else random.randrange(min(size, 64) + 1)
    how = random.randrange(8)
    if how == 0 and at < size:
        data[at] ^= 1 << random.randrange(8)
    elif how == 1 and at < size:
        data[at] = random.randrange(256)
    elif how == 2:
        width = random.choice((1, 2, 4, 8))
        number = random.choice(INTEGERS) % 256**width
        data[at : at + width] = number.to_bytes(width, random.choice(("little", "big")))
    elif how == 3:
        del data[at:]
    elif how == 4:
        del data[at : at + random.randint(1, 16)]
    elif how == 5:
        data[at:at] = random.randbytes(random.randint(1, 16))
    elif how == 6:
        data[at:at] = data[at : at + random.randint(1, 64)] * random.randint(1, 3)
    else:
        other = random.choice(seeds)
        start = random.randrange(len(other) + 1)
        data[at:] = other[start:]


def text_of(random: Random, seeds: Sequence[str]) -> str:
    """Return one of the texts with one to five changes: pieces put in, left out, doubled or moved."""
    text = random.choice(seeds)
    for _ in range(random.choice((0, 1, 1, 2, 2, 3, 5))):
        at = random.randrange(len(text) + 1)
        end = min(len(text), at + random.randint(1, 20))
        how = random.randrange(6)
        if how == 0:
            text = text[:at] + random.choice(TOKENS) + text[at:]
        elif how == 1:
            text = text[:at] + text[end:]
        elif how == 2:
            text = text[:at] + random.choice(TOKENS) + text[end:]
        elif how == 3:
            text = text[:at] + text[at:end] * random.choice((2, 2, 3, 50)) + text[end:]
        elif how == 4:
            text = text[:at]
        else:
            lines = text.split("\n")
            random.shuffle(lines)
            text = "\n".join(lines)
    return text


def tree_of(random: Random, seeds: Sequence[Any]) -> Any:
    """Return a copy of one of the nested values in which one to four places are changed."""
    tree = copy.deepcopy(random.choice(seeds))
    with suppress(RecursionError):  # of copies: nested values put into nested values
        return _changed(random, tree)
    return tree


def _changed(random: Random, tree: Any) -> Any:
    for _ in range(random.choice((0, 1, 1, 1, 2, 3, 4))):
        places = list(_places(tree))
        if not places:
            return value_of(random)
        inner, key = random.choice(places)
        _change_place(random, inner, key, places)
    return tree


def _change_place(random: Random, inner: Any, key: Any, places: Sequence[tuple[Any, Any]]) -> None:
    how = random.randrange(6)
    if how == 0:
        del inner[key]
    elif how == 1 and isinstance(inner, dict):
        name = random.choice((*(str(place[1]) for place in places), "x", "", "name", "kind", 1, None, True))
        inner[name] = inner.pop(key)
    elif how == 2:
        other, at = random.choice(places)
        if key in inner if isinstance(inner, dict) else key < len(inner):
            inner[key] = copy.deepcopy(other[at])
    elif how == 3 and isinstance(inner[key], int | float) and not isinstance(inner[key], bool):
        inner[key] = _scaled(random, inner[key])
    else:
        inner[key] = value_of(random)


def _scaled(random: Random, number: float) -> float:
    try:
        return number * random.choice((-1, 0.5, 2, 10, 1000)) + random.choice((-1, 0, 0.5, 1))
    except OverflowError:
        return -number


def value_of(random: Random) -> Any:
    """Return a value of any type."""
    if random.random() < 0.05:
        deep: Any = 1
        for _ in range(random.choice((10, 100, 400))):
            deep = [deep] if random.random() < 0.5 else {"a": deep}
        return deep
    return copy.deepcopy(random.choice(VALUES))


def _places(tree: Any) -> list[tuple[Any, Any]]:
    """Return every mapping or list of a nested value with each of its keys."""
    found: list[tuple[Any, Any]] = []
    rest = [tree]
    while rest:
        inner = rest.pop()
        keys: Any = (
            list(inner) if isinstance(inner, dict) else range(len(inner)) if isinstance(inner, list) else ()
        )
        found += [(inner, key) for key in keys]
        rest += [inner[key] for key in keys]
    return found
