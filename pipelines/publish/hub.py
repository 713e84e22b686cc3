"""The Hugging Face Hub: the one module that knows it. The token comes from the environment (HF_TOKEN)."""

from __future__ import annotations

from pathlib import Path

from cluster.errors import UserError


def push(folder: Path, repository: str, kind: str, *, private: bool) -> str:
    """Upload a folder as one commit to a repository of `kind` model or dataset, made where it is missing.

    Returns the commit's URL.  Raises UserError when there is no token or the Hub refuses it.
    """
    from huggingface_hub import HfApi
    from huggingface_hub.errors import HfHubHTTPError, LocalTokenNotFoundError

    api = HfApi()
    try:
        api.create_repo(repository, repo_type=kind, private=private, exist_ok=True)
        return api.upload_folder(folder_path=folder, repo_id=repository, repo_type=kind,
                                 commit_message="Publish from Rayograph").commit_url
    except (HfHubHTTPError, LocalTokenNotFoundError) as error:
        raise UserError(f"the Hub refused {repository}: {error}; is HF_TOKEN set and may it write there?") from error
