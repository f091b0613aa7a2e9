"""Loads every model: a library's exceptions become one line with file and cause, and its load report is checked.

This covers Stable Diffusion's parts, CLIP, conditioners, tokenizers, schedulers, detectors, and the weights in the
package. An exported folder is compared with its SHA-256s.
"""

from .border import ModelError, border
from .files import MANIFEST, check, check_file, digest, forget_places, read_json, seal
from .parts import (
    check_place,
    find_folder,
    lacking,
    lacking_file,
    load_config,
    load_part,
    load_scheduler,
    load_tokenizer,
    load_weights,
)
from .report import loaded

__all__ = [
    "MANIFEST",
    "ModelError",
    "border",
    "check",
    "check_file",
    "check_place",
    "digest",
    "find_folder",
    "forget_places",
    "lacking",
    "lacking_file",
    "load_config",
    "load_part",
    "load_scheduler",
    "load_tokenizer",
    "load_weights",
    "loaded",
    "read_json",
    "seal",
]
