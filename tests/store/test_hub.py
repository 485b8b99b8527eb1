"""Stores on a hub that is a folder."""

import pickle
import shutil
from fnmatch import fnmatch
from types import SimpleNamespace

import numpy as np
import pytest
from huggingface_hub.errors import LocalEntryNotFoundError

from hf_distill import cli
from hf_distill.store import hub
from hf_distill.store.formats import format_of
from hf_distill.store.manifest import read_manifest
from hf_distill.store.reader import Store
from hf_distill.teachers.stored import open_store
from tests.test_cli import error_of, options

NAME = "user/name"


class Hub:
    """Repositories in folders, and what has been asked for."""

    def __init__(self, folder):
        self.repositories, self.cache, self.asked = folder / "hub", folder / "cache" / "c0ffee", []
        self.is_away = False

    def download(self, name, *, repo_type, revision, allow_patterns):
        assert (repo_type, revision in (None, "main", "c0ffee")) == ("dataset", True)
        self.asked += allow_patterns
        if self.is_away:
            raise LocalEntryNotFoundError("we cannot find the appropriate snapshot folder\nand offline mode is on")
        self.copy(self.repositories / name, self.cache, allow_patterns)
        return str(self.cache)

    def copy(self, source, target, patterns):
        for path in source.rglob("*"):
            file = path.relative_to(source)
            if path.is_file() and any(fnmatch(str(file), pattern) for pattern in patterns):
                (target / file).parent.mkdir(parents=True, exist_ok=True)
                shutil.copy(path, target / file)

    # --------------------------------------------------------------------------------------- as huggingface_hub.HfApi

    def create_repo(self, name, *, repo_type, private, exist_ok):
        assert (repo_type, exist_ok) == ("dataset", True)
        if self.is_away:
            raise ConnectionError("Cannot reach the hub: offline mode is enabled.")
        name = name if "/" in name else f"user/{name}"
        (self.repositories / name).mkdir(parents=True, exist_ok=True)
        return SimpleNamespace(repo_id=name)

    def upload_folder(self, *, repo_id, repo_type, folder_path, allow_patterns, commit_message):
        self.copy(folder_path, self.repositories / repo_id, allow_patterns)

    def file_exists(self, repo_id, filename, *, repo_type):
        return (self.repositories / repo_id / filename).exists()

    def upload_file(self, *, repo_id, repo_type, path_or_fileobj, path_in_repo, commit_message):
        (self.repositories / repo_id / path_in_repo).write_bytes(path_or_fileobj)


@pytest.fixture
def fake(tmp_path, monkeypatch):
    fake = Hub(tmp_path)
    monkeypatch.setattr(hub, "snapshot_download", fake.download)
    monkeypatch.setattr(hub, "HfApi", lambda token: fake)
    monkeypatch.chdir(tmp_path)
    return fake


def write(folder, place, *words):
    cli.main(["cache", "write", *options(folder, output_dir=place, store="sampled"), *words])


def test_a_store_is_pushed_and_trained_from_under_its_name(folder, tmp_path, fake, capsys):
    write(folder, tmp_path / "name", "--push_to_hub")
    assert f"the store is on the hub: cache:{NAME}" in capsys.readouterr().out
    there = {path.name for path in (fake.repositories / NAME).rglob("*") if path.is_file()}
    written = {path.name for path in (tmp_path / "name").rglob("*") if path.is_file()}
    assert there == written | {"README.md"}
    page = (fake.repositories / NAME / "README.md").read_text()
    assert "| store | sampled, threshold, 12 entries |" in page
    cli.main(["kd", *options(folder, teacher_model=f"cache:{NAME}@main", output_dir=tmp_path / "out")])
    assert (fake.cache / "data-0001-00000.safetensors").exists()
    for command in ("info", "verify"):
        cli.main(["cache", command, NAME])
    assert f"{NAME}: 1 shards and all else are whole" in capsys.readouterr().out


def test_only_the_data_that_is_needed_is_downloaded_and_only_once(folder, tmp_path, fake):
    write(folder, tmp_path / "name")
    repository = fake.repositories / NAME
    shutil.copytree(tmp_path / "name", repository)
    for kind in ("data", "index"):  # the same shard once more
        shutil.copy(repository / f"{kind}-0001-00000.safetensors", repository / f"{kind}-0002-00000.safetensors")
    teacher = open_store(f"cache:{NAME}", index=0, num_proc=None)
    assert len(teacher.store) > 0
    assert len(teacher.tokenizer) > 0
    assert list(fake.cache.glob("data-*")) == []
    teacher.store.require(np.array([0]))
    (data,) = fake.cache.glob("data-*")
    assert fake.asked == [*hub.FIRST, data.name]
    teacher.store.require(np.array([0]))
    assert fake.asked == [*hub.FIRST, data.name]
    again = pickle.loads(pickle.dumps(teacher.store))
    again.require(np.arange(len(again)))
    assert len(list(fake.cache.glob("data-*"))) == 2


def test_a_hub_that_is_away_is_told_in_one_line(folder, tmp_path, fake, capsys):
    write(folder, tmp_path / "name", "--push_to_hub")
    folder_of_index, fetch = hub.find_store(NAME)
    fake.is_away = True
    error = error_of(capsys, options(folder, teacher_model="cache:user/other", output_dir=tmp_path / "out"))
    assert "user/other is no folder here, and the hub gives no dataset of that name (it cannot be reached)" in error
    store = Store(folder_of_index, format_of(read_manifest(folder_of_index)).streams, fetch=fetch)
    with pytest.raises(ValueError, match=r"1 shards of the store user/name have not been downloaded, and the hub does"):
        store.require(np.arange(len(store)))
    words = options(folder, output_dir=tmp_path / "new", store="sampled")
    error = error_of(capsys, [*words, "--push_to_hub"], "cache write")
    assert "the hub does not take a dataset 'new' (it cannot be reached)" in error
    assert not (tmp_path / "new").exists()


def test_a_folder_comes_before_the_hub(folder, tmp_path, fake):
    (tmp_path / "user" / "name").mkdir(parents=True)
    assert hub.find_store("cache:user/name") == (hub.Path("user/name"), None)
    for name in ("name", "./user/none", "/user/name", "a/b/c"):
        assert hub.find_store(name)[1] is None
    assert fake.asked == []


def test_what_is_no_store_on_the_hub_is_told(folder, tmp_path, fake, capsys):
    (fake.repositories / NAME).mkdir(parents=True)
    (fake.repositories / NAME / "manifest.json").write_text('{"format": 99}')
    assert "has format 99, and this version" in error_of(capsys, [NAME], "cache info")
