"""Building objects from yaml: `target` names a class, `params` its arguments."""

import importlib
from collections.abc import Mapping
from typing import Any


def get_obj_from_str(string: str) -> Any:
    """The class or function that a dotted path names.

    Raises ValueError if the module or the name in it does not exist.
    """
    module, _, name = string.rpartition(".")
    try:
        return getattr(importlib.import_module(module), name)
    except (ImportError, AttributeError, ValueError) as error:
        raise ValueError(f"target {string!r} cannot be imported: {error}") from error


def instantiate_from_config(config: Mapping) -> Any:
    """Build what `config["target"]` names with `config["params"]`.

    Raises ValueError if there is no target.
    """
    if "target" not in config:
        raise ValueError(f"a configuration needs a `target`, this one has only {sorted(map(str, config))}")
    return get_obj_from_str(config["target"])(**(config.get("params") or {}))
