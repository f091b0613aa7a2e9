"""The one door for models: whatever a library raises becomes one line with file and cause, and its load report is read.

Every model that the project loads comes through here: Stable Diffusion's parts, CLIP, graph encoders, tokenizers,
schedulers, detectors, and the weights that ship. A folder that we exported is compared with its SHA-256s on the way.
"""

from .border import ModelError, border
from .files import MANIFEST, VERIFY, check, check_file, digest, forget_places, read_json, seal
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
    "VERIFY",
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
