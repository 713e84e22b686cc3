"""Pushes to the Hugging Face Hub; the only module that uses its API. The token is read from HF_TOKEN."""

from __future__ import annotations

from pathlib import Path

from cluster.errors import UserError


def push(folder: Path, repository: str, kind: str, *, private: bool) -> str:
    """Upload a folder as one commit to a repository of type `kind` (model or dataset), created if missing.

    Returns the commit's URL.  Raises UserError if there is no token or the Hub rejects it.
    """
    from huggingface_hub import HfApi
    from huggingface_hub.errors import HfHubHTTPError, LocalTokenNotFoundError

    api = HfApi()
    try:
        api.create_repo(repository, repo_type=kind, private=private, exist_ok=True)
        return api.upload_folder(folder_path=folder, repo_id=repository, repo_type=kind,
                                 commit_message="Publish from Rayograph").commit_url
    except (HfHubHTTPError, LocalTokenNotFoundError) as error:
        raise UserError(f"the Hub rejected {repository}: {error}; check that HF_TOKEN is set and "
                        "has write access") from error
