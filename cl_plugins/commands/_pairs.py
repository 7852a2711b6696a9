"""``KEY=VALUE`` options."""

from __future__ import annotations

from typing import Any

from cl_plugins._text import parse_yaml


def pair(text: Any, flag: str = "--set") -> tuple[str, Any]:
    """Key and value of ``KEY=VALUE``; the value is read as YAML.

    Raises:
        ValueError: for anything else.
    """
    if not isinstance(text, str):
        raise ValueError(f"`{flag}` must be KEY=VALUE, got {text!r}")
    key, separator, value = text.partition("=")
    if not separator or not key:
        raise ValueError(f"`{flag}` must be KEY=VALUE, got {text!r}")
    parsed = parse_yaml(value, f"the value of `{flag} {key[:80]}`")
    if isinstance(parsed, str):
        try:
            parsed = float(parsed)  # YAML reads 1e-3 as text
        except ValueError:
            return key, parsed
    return key, parsed


def pairs(texts: Any, flag: str) -> dict[str, Any]:
    """Keys and values of a repeated option; a configuration file may give anything.

    Raises:
        ValueError: for what is no list of ``KEY=VALUE``.
    """
    if texts is not None and not isinstance(texts, list):
        raise ValueError(f"`{flag}` must be a list of KEY=VALUE, got {texts!r}")
    return dict(pair(text, flag) for text in texts or [])


def with_root(scenario: str, data: dict[str, Any]) -> dict[str, Any]:
    """The arguments of a scenario, with ``root`` from ``CL_DATA`` where it is needed, not given and found there."""
    import importlib

    scenarios = importlib.import_module("cl_plugins.scenarios")
    presence = importlib.import_module("cl_plugins.scenarios.presence")
    folder = presence.data_folder()
    if "root" in data or folder is None or scenario not in scenarios.scenario_names():
        return data
    info = scenarios.scenario_info(scenario)
    if not info.needs:
        return data
    return {**data, "root": str(presence.find_root(info, folder) or folder)}
