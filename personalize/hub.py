"""Uploading an adapter folder to the hub: its own files only, without checkpoints, logs and strangers."""

from __future__ import annotations

from pathlib import Path

from personalize.errors import UserError
from personalize.files import read_json
from personalize.verify import MANIFEST


def repository(name: str, *, private: bool) -> str:
    """The full id of repository `name`, which is made if there is none; ask before training.

    Raises:
        UserError: nobody is logged in, the hub is out of reach, or the name is not allowed.
    """
    from huggingface_hub import HfApi

    try:
        return HfApi().create_repo(name, private=private, exist_ok=True).repo_id
    except Exception as error:  # of the library, of its HTTP client, of the network
        raise UserError(f"push_to_hub: cannot use repository {name}: {_reason(error)}; try `hf auth login`") from None


def push(folder: Path, repo_id: str) -> str:
    """Upload the adapter in `folder`; returns where it is now.

    Raises:
        UserError: it did not work; the folder is untouched, and the message says how to try again.
    """
    from huggingface_hub import HfApi

    names = read_json(folder / MANIFEST)["files"]
    try:
        done = HfApi().upload_folder(
            repo_id=repo_id, folder_path=folder, allow_patterns=names, commit_message="Upload the adapter"
        )
    except Exception as error:
        again = f"hf upload {repo_id} {folder} --exclude 'checkpoint-*' 'logs/*' 'validation/*'"
        raise UserError(f"the adapter is safe in {folder}, but was not uploaded: {_reason(error)}; {again}") from None
    return str(done)


def _reason(error: Exception) -> str:
    return (str(error) or type(error).__name__).strip().splitlines()[0]
