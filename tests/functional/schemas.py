# SPDX-License-Identifier: Apache-2.0

"""The documented schemas of the output in JSON."""

from __future__ import annotations

import json
import os
from typing import Any

import jsonschema

DOCUMENTED = os.path.join(os.path.dirname(__file__), '../../doc/source/cli')


def strict(schema: Any) -> Any:
    """Return a copy of the schema that rejects undocumented fields."""
    if isinstance(schema, list):
        return [strict(each) for each in schema]
    if not isinstance(schema, dict):
        return schema
    closed = {key: strict(value) for key, value in schema.items()}
    if 'required' in closed:
        closed['additionalProperties'] = False
    return closed


def schema_of(command: str) -> str:
    """Return the file name of a subcommand's schema.

    The subcommands check and doctor share one schema.
    """
    return '%s.schema.json' % {'check': 'doctor'}.get(command, command)


def validator(command: str) -> Any:
    """Return a validator for the documents that a subcommand prints."""
    with open(os.path.join(DOCUMENTED, schema_of(command))) as file:
        schema = strict(json.load(file))
    made = jsonschema.Draft202012Validator(
        schema, format_checker=jsonschema.FormatChecker())
    made.check_schema(schema)
    return made
