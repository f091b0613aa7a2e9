"""Answers to questions about numbers, where no kernel has computed any: flags are true, numbers 1, every row counts.
Only `isnan` is false, and any of it.

Device memory holds what was copied there, or what its last owner left. Code that takes a size from it (`nonzero`,
`unique`, `int(x.max())`) would meet rubbish; here it meets the largest size, or 1, at the price of a device: a copy to
the host, and a synchronisation. `pack`'s reference form, whose sizes are data, is computed on the host from what was
copied to the device.
"""

from __future__ import annotations

import functools
import warnings
from collections.abc import Callable
from typing import Any

import torch
from sgg_kernels import reference
from torch.utils._pytree import tree_flatten, tree_map, tree_unflatten

from . import device

_library: list[torch.library.Library] = []
_empty, _empty_like = torch.empty, torch.empty_like  # tests put others in their place


def _asked(x: torch.Tensor) -> None:
    """The host reads a number of x."""
    x.reshape(-1)[:1].to("cpu")


def _nonzero(x: torch.Tensor) -> torch.Tensor:
    _asked(x)
    return torch.zeros(x.numel(), x.ndim, dtype=torch.long, device=x.device)


def _unique2(x: torch.Tensor, sorted: bool = True, inverse: bool = False, counts: bool = False):  # type: ignore[no-untyped-def]
    _asked(x)
    index = torch.zeros(x.shape, dtype=torch.long, device=x.device)
    return x.flatten(), index, index.flatten()


def _bincount(x: torch.Tensor, weights: torch.Tensor | None = None, minlength: int = 0) -> torch.Tensor:
    _asked(x)
    return torch.zeros(max(minlength, 1), dtype=torch.long, device=x.device)


def _isnan(x: torch.Tensor) -> torch.Tensor:
    return _no(_empty_like(x, dtype=torch.bool), "isnan")


def _equal(x: torch.Tensor, y: torch.Tensor) -> bool:
    _asked(x)
    return x.shape == y.shape


def _any(x: torch.Tensor) -> torch.Tensor:
    found = _empty((), dtype=torch.bool, device=x.device)
    return _no(found, "any") if hasattr(x, "reads") else _launched(found, "any")


def _no(flag: torch.Tensor, name: str) -> torch.Tensor:
    """The flag reads False on the host."""
    declare_number(flag, False)
    return _launched(flag, name)


def _launched(x: torch.Tensor, name: str) -> torch.Tensor:
    device.library().fake_launch(torch.cuda.current_stream(x.device).cuda_stream, name.encode())
    return x


def declare_number(x: torch.Tensor, number: float) -> None:
    """A number on the device that the host is to read as it is."""
    x.reads = number  # type: ignore[attr-defined]


def _item(x: torch.Tensor) -> bool | int | float:
    _asked(x)
    if hasattr(x, "reads"):
        return x.reads
    return True if x.dtype == torch.bool else 1.0 if x.dtype.is_floating_point else 1


def _on_host(function: Callable[..., Any]) -> Callable[..., Any]:
    """`function` with its tensors copied to the host, and its results back."""

    @functools.wraps(function)
    def run(*args: Any) -> Any:
        leaves, form = tree_flatten(args)
        on = next((x.device for x in leaves if isinstance(x, torch.Tensor) and x.is_cuda), None)
        moved = [x.cpu() if isinstance(x, torch.Tensor) else x for x in leaves]
        return tree_map(
            lambda x: x.to(on) if isinstance(x, torch.Tensor) else x, function(*tree_unflatten(moved, form))
        )

    return run


def install() -> None:
    """From here to the end of the process."""
    library = torch.library.Library("aten", "IMPL")
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # that torch's own are put aside
        for name, answer in (("nonzero", _nonzero), ("_unique2", _unique2), ("bincount", _bincount),
                             ("isnan", _isnan), ("any", _any), ("equal", _equal),
                             ("_local_scalar_dense", _item)):  # fmt: skip
            library.impl(name, answer, "CUDA")
    _library.append(library)
    reference.pack = _on_host(reference.pack)
