"""Checks a library's load report: every tensor of the model was in the file, in the model's shape."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from .border import ModelError

_CURE = "get the file again"


def loaded(model: Any, info: Mapping[str, Any]) -> Any:
    """`model`, if its load report (`output_loading_info=True`) has no faults. Raises `ModelError` naming a tensor.

    A missing tensor would be uninitialised memory. Unused tensors are allowed: published files hold buffers such as
    `position_ids`.
    """
    if missing := sorted(map(str, info.get("missing_keys") or ())):
        raise ModelError(f"lacks the tensor {missing[0]}{_more(missing)}: {_CURE}")
    if mismatched := sorted(info.get("mismatched_keys") or (), key=str):
        name, there, wanted = mismatched[0]
        raise ModelError(
            f"{name} has the shape {list(there)}, where config.json means {list(wanted)}{_more(mismatched)}: {_CURE}, "
            "or the config.json that belongs to it"
        )
    if errors := [str(each) for each in info.get("error_msgs") or ()]:
        raise ModelError(errors[0].strip().splitlines()[0])
    return model


def _more(found: list) -> str:
    return f" and {len(found) - 1} more" if len(found) > 1 else ""
