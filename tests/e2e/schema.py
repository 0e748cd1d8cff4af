"""As much of JSON Schema as protocol/json uses, and stricter: what is not declared is an error."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

DIRECTORY = Path(__file__).parents[2] / "protocol/json"
NAMES = sorted(path.name.removesuffix(".schema.json") for path in DIRECTORY.glob("*.schema.json"))
KNOWN = {
    "$defs", "$ref", "$schema", "additionalProperties", "description", "enum", "items", "properties",
    "required", "title", "type",
}  # fmt: skip
TYPES: dict[str, tuple[type, ...]] = {
    "array": (list,),
    "boolean": (bool,),
    "integer": (int,),
    "null": (type(None),),
    "number": (int, float),
    "object": (dict,),
    "string": (str,),
}


def load(name: str) -> dict[str, Any]:
    """Return the schema of what a verb prints."""
    return json.loads((DIRECTORY / f"{name}.schema.json").read_text())  # type: ignore[no-any-return]


def problems(value: Any, name: str) -> list[str]:
    """Return how a value differs from the schema of a verb."""
    schema = load(name)
    return list(_problems(value, schema, schema, "$"))


def _problems(value: Any, schema: dict[str, Any], whole: dict[str, Any], path: str) -> Any:
    assert schema.keys() <= KNOWN, schema.keys() - KNOWN
    if "$ref" in schema:
        schema = whole["$defs"][schema["$ref"].removeprefix("#/$defs/")]
    kinds = schema["type"] if isinstance(schema["type"], list) else [schema["type"]]
    types = tuple(each for kind in kinds for each in TYPES[kind])
    # A bool is an int to isinstance.
    if not isinstance(value, types) or (isinstance(value, bool) and bool not in types):
        yield f"{path}: {value!r} is not {kinds}"
        return
    if "enum" in schema and value not in schema["enum"]:
        yield f"{path}: {value!r} is none of {schema['enum']}"
    if isinstance(value, dict):
        properties, others = schema.get("properties", {}), schema.get("additionalProperties")
        yield from (f"{path}: {key} is missing" for key in schema.get("required", ()) if key not in value)
        for key, each in value.items():
            if key in properties:
                yield from _problems(each, properties[key], whole, f"{path}.{key}")
            elif isinstance(others, dict):
                yield from _problems(each, others, whole, f"{path}.{key}")
            elif others is not True:
                yield f"{path}: {key} is not declared"
    elif isinstance(value, list):
        for index, each in enumerate(value):
            yield from _problems(each, schema["items"], whole, f"{path}[{index}]")
