"""Loaders for one part of a model folder: configuration, weights, tokenizer, scheduler.

Every message names the file below the folder; a `border` of the caller puts the flag and the folder in front.
"""

from __future__ import annotations

import functools
import inspect
import logging
from collections.abc import Callable, Iterable, Sequence
from pathlib import Path
from typing import Any

import diffusers
import torch
from diffusers import DDIMScheduler, PNDMScheduler
from diffusers.models.modeling_utils import ModelMixin
from huggingface_hub import snapshot_download
from safetensors import safe_open
from safetensors.torch import load_file
from torch import nn
from transformers import CLIPTokenizer, PretrainedConfig

from . import kinds
from .border import ModelError, border
from .files import check_file, read_json
from .report import loaded

logger = logging.getLogger(__name__)

_KNOWN_BY = {
    "model": (("config.json",),),
    "tokenizer": (("tokenizer.json",), ("vocab.json", "merges.txt")),
    "scheduler": (("scheduler_config.json",),),
}
"""Kind of part -> sets of files, one of which must exist. (The library loads a tokenizer without files as empty.)
"""
_WEIGHTS = ("diffusion_pytorch_model.safetensors", "model.safetensors")
_ENDS = ("json", "txt", "safetensors")
_FLOATS = {"F64", "F32", "F16", "BF16"}


def check_place(flag: str, place: str) -> None:
    """Raise `ModelError` for a place that is neither a folder nor a possible hub id."""
    if not Path(place).is_dir() and (place.startswith((".", "/", "~")) or place.count("/") != 1):
        raise ModelError(f"{flag} {place}: there is no such folder, and it is not a hub id (owner/name)")


def find_folder(flag: str, place: str, parts: Sequence[str], ends: Sequence[str] = _ENDS) -> Path:
    """`place` if it is a folder, else the folder in the hub's cache with the files of `parts` of that repository.

    Raises `ModelError`.
    """
    check_place(flag, place)
    if Path(place).is_dir():
        return Path(place)
    wanted = ["model_index.json", *(f"{part}/*.{end}" if part else f"*.{end}" for part in parts for end in ends)]
    with border(f"{flag} {place}: no such folder, and as a hub id it cannot be loaded"):
        return Path(snapshot_download(place, allow_patterns=wanted, ignore_patterns=["*.fp16.*", "*non_ema*"]))


def lacking_file(root: Path, parts: Iterable[str]) -> str | None:
    """The first missing PART/FILE of `parts` in a diffusers folder, or None. A part's kind is its name's last word; a
    number behind that word (text_encoder_2) is left out."""
    for part in parts:
        kind = part.removesuffix("_2").rpartition("_")[2]
        if file := lacking(root / part, kind if kind in _KNOWN_BY else "model"):
            return f"{part}/{file}"
    return None


def lacking(folder: Path, kind: str) -> str | None:
    """The missing file of a part of this kind ("model", "tokenizer", "scheduler"), or None."""
    there = (all((folder / file).is_file() for file in files) for files in _KNOWN_BY[kind])
    return None if any(there) else _KNOWN_BY[kind][0][0]


def load_config(root: Path, part: str, check: Callable[[kinds.PartConfig], None], key: str, *allowed: str) -> dict:
    """The part's config.json, of a class in `allowed`, after `check`. Raises `ModelError`."""
    name = _named(part, "config.json")
    config = read_json(root / name, name)
    with border(name):
        kinds.check_class(config, key, allowed)
        check(config)
    return config


def load_part(root: Path, part: str, kind: Any, config: dict[str, Any]) -> Any:
    """The model in `root / part`, in fp32, complete by the library's report. Raises `ModelError` that names the file.

    kind: a class of diffusers or transformers, or a subclass in this package; config: the result of `load_config`.
    """
    name, of_diffusers = _named(part, "config.json"), issubclass(kind, ModelMixin)
    files = _weight_files(root, part)
    num_tensors = sum(_check_header(root / file, file) for file in files)
    with border(name):
        kinds.check_depth(config, num_tensors)
        if of_diffusers:
            _say_unknown(name, kind.extract_init_dict(dict(config))[1])
        with torch.device("meta"):  # finds errors of the configuration alone
            kind.from_config(dict(config)) if of_diffusers else kind(kind.config_class.from_dict(dict(config)))
    full = {"torch_dtype" if of_diffusers else "dtype": torch.float32}
    with border(files[0]):
        return loaded(
            *kind.from_pretrained(
                root / part, use_safetensors=True, output_loading_info=True, ignore_mismatched_sizes=True,
                local_files_only=True, **full,
            )
        )  # fmt: skip


def load_weights(path: Path, module: nn.Module, cure: str) -> None:
    """Load a safetensors file into `module`, half precision as fp32. Raises `ModelError` that ends in `cure`."""
    with border(str(path)):
        if not path.is_file():
            raise ModelError(f"is not there; {cure}")
        check_file(path)
        _check_header(path, "its header")
        state = {k: v.float() if v.is_floating_point() else v for k, v in load_file(path).items()}
        wanted = module.state_dict()
        shapes = [(k, v.shape, wanted[k].shape) for k, v in state.items() if k in wanted and v.shape != wanted[k].shape]
        loaded(module, {"missing_keys": wanted.keys() - state.keys(), "mismatched_keys": shapes})
        module.load_state_dict({k: v for k, v in state.items() if k in wanted})


def load_tokenizer(root: Path, part: str, tower: PretrainedConfig | None = None) -> CLIPTokenizer:
    """CLIP's tokenizer; without a length of its own it gets that of the text `tower`. Raises `ModelError`."""
    if file := lacking(root / part, "tokenizer"):
        raise ModelError(f"the folder lacks {_named(part, file)}")
    for file in ("tokenizer.json", "vocab.json", "tokenizer_config.json", "special_tokens_map.json",
                 "added_tokens.json"):  # fmt: skip
        if (root / part / file).is_file():
            read_json(root / part / file, _named(part, file))
    main = _named(part, "tokenizer.json" if (root / part / "tokenizer.json").is_file() else "vocab.json")
    with border(main):
        tokenizer = CLIPTokenizer.from_pretrained(root / part, local_files_only=True)
        ids = list(tokenizer.get_vocab().values())
        if len(set(ids)) < len(ids) or not ids:
            raise ModelError("two of its tokens have one id" if ids else "has no tokens")
        if lost := [word for word in ("bos", "eos", "pad") if getattr(tokenizer, f"{word}_token_id") is None]:
            raise ModelError(f"has no {lost[0]}_token")
        if tower is not None and max(ids) >= tower.vocab_size:
            raise ModelError(f"has ids up to {max(ids)}, but the text tower knows {tower.vocab_size} tokens")
    length = tokenizer.model_max_length
    with border(_named(part, "tokenizer_config.json")):
        if isinstance(length, bool) or not isinstance(length, int) or length < 3:
            raise ModelError(f"model_max_length must be a whole number from 3, not {length!r}")
    tokenizer.model_max_length = min(length, tower.max_position_embeddings if tower else kinds.TEXT_LENGTH)
    return tokenizer


def load_scheduler(root: Path, part: str, as_ddim: bool = False) -> Any:
    """The part's scheduler; `as_ddim`: a DDIM scheduler with its schedule. Raises `ModelError`."""
    name = _named(part, "scheduler_config.json")
    config = read_json(root / name, name)
    with border(name):
        kind = config.get("_class_name")
        if not isinstance(kind, str) or kind not in _schedulers():
            kinds.check_class(config, "_class_name", ("DDIMScheduler", "PNDMScheduler", "another with beta_schedule"))
        kinds.check_scheduler(config)
        own = getattr(diffusers, str(kind))
        known = {word for each in (own, DDIMScheduler, PNDMScheduler) for word in inspect.signature(each).parameters}
        _say_unknown(name, {word for word in config if word not in known and not word.startswith("_")})
        if as_ddim:
            # Stable Diffusion's first files omit settings whose defaults differ between PNDM and DDIM.
            meant = {"steps_offset": 1} | ({} if own is DDIMScheduler else {"set_alpha_to_one": False})
            # Another scheduler's settings would be written into the trained model, as its own.
            taken = {k: v for k, v in config.items() if k in inspect.signature(DDIMScheduler).parameters}
            scheduler = DDIMScheduler.from_config({**meant, **taken}, clip_sample=False)
        else:
            scheduler = own.from_config(config)
        alpha_bar = scheduler.alphas_cumprod
        if not (torch.isfinite(alpha_bar).all() and alpha_bar.min() >= 0 and alpha_bar.max() <= 1):
            raise ModelError("its betas give no alpha_bar between 0 and 1")
    return scheduler


@functools.cache
def _schedulers() -> frozenset[str]:
    """Scheduler classes of diffusers that take betas, as Stable Diffusion's do."""
    kinds = [getattr(diffusers, name) for name in dir(diffusers) if name.endswith("Scheduler")]
    taken = {kind.__name__: inspect.signature(kind).parameters.keys() for kind in kinds if isinstance(kind, type)}
    return frozenset(name for name, given in taken.items() if {"beta_schedule", "prediction_type"} <= given)


def weights_name(folder: Path) -> str:
    """File name of the weights in the library of this part."""
    config = read_json(folder / "config.json", f"{folder}/config.json")
    return _WEIGHTS[0] if "_class_name" in config else _WEIGHTS[1]


def _weight_files(root: Path, part: str) -> list[str]:
    """Names below `root` of the part's safetensors files, after a check of its index of shards."""
    folder = root / part
    for file in _WEIGHTS:
        if (folder / f"{file}.index.json").is_file():
            name = _named(part, f"{file}.index.json")
            shards = read_json(root / name, name).get("weight_map")
            with border(name):
                if not isinstance(shards, dict) or not shards:
                    raise ModelError("has no weight_map")
                for shard in shards.values():
                    if not isinstance(shard, str) or "/" in shard or not shard.endswith(".safetensors"):
                        raise ModelError(f"a shard must be a safetensors file beside it, not {shard!r}")
                    if not (folder / shard).is_file():
                        raise ModelError(f"{shard} is not there")
            return [_named(part, shard) for shard in sorted(set(shards.values()))]
        if (folder / file).is_file():
            return [_named(part, file)]
    there = sorted(path.name for path in folder.iterdir() if path.suffix in (".safetensors", ".bin"))
    if not there:
        raise ModelError(f"the folder lacks {_named(part, 'its weights (*.safetensors)')}")
    what = "pickled weights, which are never opened" if there[0].endswith(".bin") else "weights of a variant"
    what = "weights of a variant" if any(file.endswith(".safetensors") for file in there) else what
    raise ModelError(
        f"{_named(part, there[0])}: only {what}; `python -m sgg_fast.nn.loading convert {folder}` writes the "
        "safetensors file that is needed"
    )


def _check_header(path: Path, what: str) -> int:
    """Number of tensors in a safetensors file, after a check of its header. Raises `ModelError`."""
    with border(what), safe_open(path, framework="pt") as file:
        names = list(file.keys())
        for name in names:
            if (dtype := file.get_slice(name).get_dtype()) not in _FLOATS and not name.endswith("position_ids"):
                raise ModelError(f"{name} is stored as {dtype}; needed is one of {', '.join(sorted(_FLOATS))}")
        return len(names)


def _say_unknown(name: str, words: Iterable[str]) -> None:
    if words := sorted(words):
        logger.warning("%s: %s: no setting that this version knows; left out", name, ", ".join(words))


def _named(part: str, file: str) -> str:
    return f"{part}/{file}" if part else file
