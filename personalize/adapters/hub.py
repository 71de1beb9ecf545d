"""Uploading an adapter folder to the Hugging Face Hub: only the files that belong to the adapter."""

from __future__ import annotations

from pathlib import Path

from personalize.errors import UserError, first_line, typed
from personalize.formats.adapter_folders import MANIFEST
from personalize.io.json_files import read_json


def repository(name: str, *, private: bool) -> str:
    """The full id of the repository `name`, which is created if it does not exist; called before training.

    Raises:
        UserError: nobody is logged in, the hub cannot be reached, or the name is not allowed.
    """
    from huggingface_hub import HfApi

    try:
        return HfApi().create_repo(name, private=private, exist_ok=True).repo_id
    except Exception as error:  # the library, its HTTP client and the network raise different types
        raise UserError(
            f"push_to_hub: cannot use repository {name}: {first_line(error)}; try `hf auth login`"
        ) from None


def push(folder: Path, repo_id: str) -> str:
    """Upload the adapter in `folder` and return its address on the hub.

    Raises:
        UserError: the upload failed; the folder is unchanged, and the message says how to try again.
    """
    from huggingface_hub import HfApi

    names = read_json(folder / MANIFEST)["files"]
    try:
        commit = HfApi().upload_folder(
            repo_id=repo_id, folder_path=folder, allow_patterns=names, commit_message="Upload the adapter"
        )
    except Exception as error:
        again = typed("hf", "upload", repo_id, folder, "--exclude", "checkpoint-*", "logs/*", "validation/*")
        raise UserError(
            f"the adapter is safe in {folder}, but was not uploaded: {first_line(error)}; {again}"
        ) from None
    return str(commit)
