"""Uploads the result of fine-tuning to the Hugging Face Hub (--push-to-hub)."""

from __future__ import annotations

import json
import shutil
import tempfile
from pathlib import Path
from typing import Any

from sgg_fast.config import ConfigError


def check_hub(repo: str, stage: str) -> None:
    """Create the repository unless it exists, so that nothing is missing when the run ends.

    Raises `ConfigError` without a token, without a connection, and for a repository that may not be written to.
    """
    from huggingface_hub import HfApi, get_token
    from huggingface_hub.utils import HFValidationError, validate_repo_id

    if stage != "finetune":
        raise ConfigError(f"--push-to-hub {repo}: pre-training leaves no pipeline: push from --stage finetune")
    try:
        validate_repo_id(repo)
    except HFValidationError as error:
        raise ConfigError(f"--push-to-hub {repo}: not a repository (OWNER/NAME)") from error
    if get_token() is None:
        raise ConfigError(f"--push-to-hub {repo}: there is no token: type `hf auth login`, or set HF_TOKEN")
    try:
        HfApi().create_repo(repo, exist_ok=True)
        HfApi().auth_check(repo, write=True)  # the line above passes for a repository that others own
    except Exception as error:  # border
        raise ConfigError(f"--push-to-hub {repo}: {_cause(error)}") from error


def push(result: Path, repo: str) -> str:
    """Upload a pipeline folder; returns its address. A LoRA's base is uploaded as a name, not as a local path.

    Raises `ConfigError`; the folder stays, and the same command tries again.
    """
    from huggingface_hub import HfApi

    with tempfile.TemporaryDirectory() as aside:
        folder = _without_paths(result, Path(aside))
        try:
            HfApi().upload_folder(repo_id=repo, folder_path=folder, commit_message="Upload by sgg_fast")
        except Exception as error:  # border
            raise ConfigError(
                f"--push-to-hub {repo}: {_cause(error)}; {result} is whole, and the same command uploads it"
            ) from error
    return f"{HfApi().endpoint}/{repo}"


def _without_paths(result: Path, aside: Path) -> Path:
    """`result`, or a copy of a LoRA result in `aside` whose base is named without its folder."""
    from sgg_fast.nn.loading import seal

    index: dict[str, Any] = json.loads((result / "model_index.json").read_text(encoding="utf-8"))
    base = index.get("base")
    if base is None:
        return result
    copy = aside / result.name
    shutil.copytree(result, copy)
    index["base"] = {name: Path(place).name if Path(place).is_absolute() else place for name, place in base.items()}
    (copy / "model_index.json").write_text(json.dumps(index, indent=2, sort_keys=True) + "\n", encoding="utf-8")
    seal(copy)
    return copy


def _cause(error: Exception) -> str:
    return f"{type(error).__name__}: {' '.join(str(error).split())}"[:300]
