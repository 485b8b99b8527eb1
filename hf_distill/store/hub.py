"""Stores on the hub: a dataset repository with the files of the folder."""

import os
import re
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from huggingface_hub import HfApi, snapshot_download
from huggingface_hub.errors import HTTPError

CACHE = "cache:"  # what a name begins with that is a store
# All but the data. What is there is known from these, and which data is needed.
FIRST = ["manifest.json", "index-*.safetensors", "head.safetensors", "rounding.safetensors", "tokenizer/*"]
HUB_NAME = re.compile(r"\w[\w.-]*/[\w.-]+(@[\w./-]+)?")
ERRORS = (OSError, HTTPError, ValueError)  # of a name that is none, of a hub that is away or refuses


@dataclass(frozen=True)
class HubShards:
    """Downloads the data of shards, to where the rest of the store is.

    Args:
        name: of the repository.
        revision: the commit that the rest is of.
    """

    name: str
    revision: str

    def __call__(self, shards: Sequence[str]) -> None:
        """Downloads shards with names such as 0001-00000; `ValueError` if the hub does not give them."""
        try:
            _download(self.name, self.revision, [f"data-{shard}.safetensors" for shard in shards])
        except ERRORS as error:
            raise ValueError(
                f"{len(shards)} shards of the store {self.name} have not been downloaded, and the hub does not give "
                f"them ({_reason(error)})"
            ) from error


def find_store(name: str) -> tuple[Path, HubShards | None]:
    """The folder that a name means, with or without `cache:` before it, and how to get data that is not there yet.

    A name such as user/name or user/name@revision that is no folder is a dataset on the hub: all but its data is
    downloaded.

    Raises:
        `ValueError`: the hub does not give it.
    """
    name = name.removeprefix(CACHE)
    if not name:
        raise ValueError(f"{CACHE!r} names no store: give its folder or hub id after the colon")
    folder = Path(os.path.expanduser(name))
    if folder.exists() or not HUB_NAME.fullmatch(name):
        return folder, None
    repository, _, revision = name.partition("@")
    try:
        folder = Path(_download(repository, revision or None, FIRST))
    except ERRORS as error:
        raise ValueError(
            f"{name} is no folder here, and the hub gives no dataset of that name ({_reason(error)}): check the name; "
            "without a network give the folder of a store"
        ) from error
    return folder, HubShards(repository, folder.name)


def _download(name: str, revision: str | None, patterns: list[str]) -> Any:
    """The folder with the files of a commit, whose name it has."""
    return snapshot_download(name, repo_type="dataset", revision=revision, allow_patterns=patterns)


def create_repository(name: str, *, token: str | None = None, private: bool | None = None) -> str:
    """Makes a dataset repository, unless it is there; its whole name.

    Raises:
        `ValueError`: the hub refuses, or is away.
    """
    try:
        return HfApi(token=token).create_repo(name, repo_type="dataset", private=private, exist_ok=True).repo_id
    except ERRORS as error:
        raise ValueError(
            f"the hub does not take a dataset {name!r} ({_reason(error)}): log in with `hf auth login`, or write the "
            "store without --push_to_hub and push it later with the same command"
        ) from error


def push(folder: Path, name: str, card: str, *, token: str | None = None) -> None:
    """Uploads a store. What is there already is not sent again.

    Args:
        folder: of the store.
        name: of the repository.
        card: its page, Markdown; one that is there stays.

    Raises:
        `ValueError`: the hub refuses, or is away.
    """
    api = HfApi(token=token)
    try:
        api.upload_folder(
            repo_id=name, repo_type="dataset", folder_path=folder, allow_patterns=[*FIRST, "data-*.safetensors"],
            commit_message="Add documents",
        )  # fmt: skip
        if not api.file_exists(name, "README.md", repo_type="dataset"):
            api.upload_file(
                repo_id=name, repo_type="dataset", path_or_fileobj=card.encode(), path_in_repo="README.md",
                commit_message="Describe the store",
            )  # fmt: skip
    except ERRORS as error:
        raise ValueError(
            f"the store is whole in {folder}, but the hub has not taken all of it ({_reason(error)}): the same command "
            "goes on"
        ) from error


def _reason(error: Exception) -> str:
    text = " ".join(str(error).split())
    if "offline" in text.lower() or "ConnectError" in text or "couldn't connect" in text:
        return "it cannot be reached"
    return text[:200]
