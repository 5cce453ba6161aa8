"""What a file says, held against what it should say: one parser for numbers, one reader for JSON."""

import json
import math
import types
from collections.abc import Mapping
from pathlib import Path
from typing import Any

DIGITS = 18  # of a number that a file may hold: identities, cameras, images; all such are int64
COUNT = range(10**DIGITS)

# What a value should be, as plain Python:
#   str, bool, int, float, dict, str | None     a value of this type; a float is finite, and may be whole
#   range(16, 4097)                             a whole number in it
#   {10, 18, 34}                                one of these values
#   [schema]                                    a list, each of its entries so
#   (schema, schema)                            a list of this length, its entries so
#   {"name": schema, "name?": schema, ...: schema}
#                                               an object with these members, those with ? maybe; ...: others
Schema = Any


def whole_number(value: Any, where: str) -> int:
    """The number that a file states in at most `DIGITS` decimal digits.

    Errors: ValueError that begins with `where`: the file, and the place in it, of what is no such number.
    """
    text = str(value).strip()
    if text.isascii() and text.isdecimal() and len(text.lstrip("0")) <= DIGITS:
        return int(text)
    raise ValueError(f"{where} should be a whole number of at most {DIGITS} digits, not {_shown(text)}")


def read_json(path: Path, schema: Schema) -> Any:
    """The content of a JSON file that agrees with its schema.

    Errors: FileNotFoundError; ValueError `<path> is damaged: <place>: <what was expected, what is there>`.
    """
    if not path.is_file():
        raise FileNotFoundError(f"there is no file {path}")
    return parse_json(path.read_bytes(), schema, str(path))


def parse_json(text: str | bytes, schema: Schema, where: str) -> Any:
    """`read_json` of what was read already; where: the file, and the place in it, for errors."""
    try:
        value = json.loads(text, parse_constant=_refuse)
    except RecursionError:
        raise ValueError(f"{where} is damaged: it is nested too deeply") from None
    except ValueError as e:
        raise ValueError(f"{where} is damaged: it is no JSON ({e})") from e
    require(value, schema, f"{where} is damaged")
    return value


def require(value: Any, schema: Schema, where: str) -> None:
    """A ValueError that begins with `where` and names the place in this value that breaks the schema."""
    if isinstance(schema, Mapping):
        _expect(isinstance(value, dict), value, "an object", where)
        for name in schema:
            if isinstance(name, str) and not name.endswith("?") and name not in value:
                raise ValueError(f"{where}: {name!r} is missing")
        for name, member in value.items():
            known = schema.get(name, schema.get(f"{name}?", schema.get(..., object)))
            require(member, known, f"{where}: {_shown(name)}")
    elif isinstance(schema, list | tuple):
        _expect(isinstance(value, list), value, "a list", where)
        if isinstance(schema, tuple):
            _expect(len(value) == len(schema), value, f"a list of {len(schema)}", where)
        for number, entry in enumerate(value):
            inner = schema[number] if isinstance(schema, tuple) else schema[0]
            require(entry, inner, f"{where}: entry {number + 1}")
    elif isinstance(schema, range):
        told = f"a whole number from {schema[0]} to {schema[-1]}"
        _expect(type(value) is int and value in schema, value, told, where)
    elif isinstance(schema, set):
        fits = any(type(value) is type(choice) and value == choice for choice in schema)
        _expect(fits, value, f"one of {', '.join(sorted(map(repr, schema)))}", where)
    elif schema is float:
        _expect(type(value) in (int, float) and _is_finite(value), value, "a number", where)
    else:
        fits = isinstance(value, schema) and (schema is not int or type(value) is int)
        name = str(schema) if isinstance(schema, types.UnionType) else schema.__name__
        _expect(fits, value, name, where)


def _expect(fits: bool, value: Any, wanted: str, where: str) -> None:
    if not fits:
        kind = f"{type(value).__name__} " if isinstance(value, dict | list) else ""
        raise ValueError(f"{where}: expected {wanted}, got {kind}{_shown(value)}")


def _is_finite(value: float) -> bool:
    try:
        return math.isfinite(value)
    except OverflowError:  # a whole number beyond every float
        return False


def _shown(value: Any) -> str:
    """What a file holds, in at most one line."""
    try:
        text = repr(value)
    except (ValueError, RecursionError):  # of too many digits, or levels, for Python to write out
        return "something too long to show"
    return text if len(text) <= 60 else f"{text[:40]}... of {len(text):,} characters"


def _refuse(constant: str) -> Any:
    raise ValueError(f"{constant} is no number")
