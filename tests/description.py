"""Holds answers to openapi.json, as far as JSON Schema is used there."""

import json
import re
from pathlib import Path

DESCRIPTION = json.loads(Path(__file__).parent.with_name("openapi.json").read_text(encoding="utf-8"))
# What info.description says of every answer.
HEADERS = {"Cache-Control": "no-store", "X-Content-Type-Options": "nosniff"}
TYPES = {
    "object": dict,
    "array": list,
    "string": str,
    "integer": int,
    "boolean": bool,
    "null": type(None),
}
FORMATS = {
    "uuid": r"[0-9a-f]{8}-[0-9a-f]{4}-4[0-9a-f]{3}-[89ab][0-9a-f]{3}-[0-9a-f]{12}",
    "date-time": r"\d{4}-\d\d-\d\dT\d\d:\d\d:\d\dZ",
}
UNDERSTOOD = {"type", "format", "pattern", "minLength", "maxLength", "minimum", "maximum", "const", "enum", "required"}
UNDERSTOOD |= {"properties", "additionalProperties", "items", "minItems", "maxItems"}
UNDERSTOOD |= {"oneOf", "allOf", "description", "default"}


def resolve(value):
    """Follow a $ref, if the value is one. Beside it there may be another description."""
    if "$ref" in value:
        assert set(value) <= {"$ref", "description"}, value
        target = DESCRIPTION
        for name in value["$ref"].split("/")[1:]:
            target = target[name]
        return target
    return value


def fits(value, schema):
    """Return whether a value is what a schema describes."""
    schema = resolve(schema)
    assert set(schema) <= UNDERSTOOD, schema
    kind = schema.get("type")
    if kind and (not isinstance(value, TYPES[kind]) or (kind == "integer" and isinstance(value, bool))):
        return False
    if "const" in schema and value != schema["const"]:
        return False
    if "enum" in schema and value not in schema["enum"]:
        return False
    if "oneOf" in schema and sum(fits(value, one) for one in schema["oneOf"]) != 1:
        return False
    if not all(fits(value, one) for one in schema.get("allOf", [])):
        return False
    if isinstance(value, str):
        return (
            schema.get("minLength", 0) <= len(value) <= schema.get("maxLength", len(value))
            and re.search(schema.get("pattern", ""), value) is not None
            and re.fullmatch(FORMATS.get(schema.get("format"), ".*"), value, re.DOTALL) is not None
        )
    if isinstance(value, int):
        return schema.get("minimum", value) <= value <= schema.get("maximum", value)
    if isinstance(value, list):
        few = schema.get("minItems", 0) <= len(value) <= schema.get("maxItems", len(value))
        return few and all(fits(item, schema.get("items", {})) for item in value)
    if isinstance(value, dict):
        properties = schema.get("properties", {})
        return (
            set(schema.get("required", [])) <= set(value)
            and (schema.get("additionalProperties", True) or set(value) <= set(properties))
            and all(fits(value[name], properties[name]) for name in set(value) & set(properties))
        )
    return True


def described_path(path):
    """Return the path of the description that a request's path, as WSGI has it, belongs to, or None."""
    try:
        path.encode("latin1").decode()
    except UnicodeError:
        return None
    for template in DESCRIPTION["paths"]:
        pattern = re.escape(template.rstrip("/")).replace(r"\{raffle_id\}", "[^/]+")
        if re.fullmatch(f"{pattern}/?", path.partition("?")[0]):
            return template
    return None


def described_response(method, path, status):
    """Return what the description says of a response with this status, and fail if it says nothing."""
    template = described_path(path)
    operations = DESCRIPTION["paths"][template] if template else {}
    operation = operations.get({"HEAD": "get"}.get(method, method.lower()))
    if operation:
        responses, others = operation["responses"], (500,)
    else:
        names = {"403": "CrossOrigin", "421": "Misdirected", "default": "Error"}
        responses = {status: {"$ref": f"#/components/responses/{name}"} for status, name in names.items()}
        others = (405,) if template else (404,)
    # default is for what any request may be answered, not for what an operation forgot to mention.
    assert str(status) in responses or status in others, (method, path, status)
    return resolve(responses.get(str(status), responses["default"]))


def assert_described(method, path, status, headers, body):
    """Check that an answer is one that the description announces for the request."""
    response = described_response(method, path, status)
    for name, value in HEADERS.items():
        assert headers.get(name) == value, (name, method, path, status)
    for name, header in response.get("headers", {}).items():
        header = resolve(header)
        assert name in headers or not header.get("required"), (name, method, path, status)
        if name in headers:
            kind = header["schema"].get("type")
            assert fits(int(headers[name]) if kind == "integer" else headers[name], header["schema"]), (name, headers)
    content = response["content"][headers["Content-Type"]]
    if method != "HEAD":
        value = json.loads(body)
        assert fits(value, content["schema"]), (method, path, status, body[:500])
        assert status < 400 or value["status"] == status, (method, path, status, body[:500])
