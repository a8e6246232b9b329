"""A Hub in a folder: what is uploaded lies in the Hub's cache, from which the loaders read it without a network."""

import shutil
from pathlib import Path
from unittest import mock

from huggingface_hub import HfApi

SHA = "0" * 40


class HubStub:
    """Replaces the calls of `HfApi` that write and list; the cache's own code reads.

    Args:
        cache: folder of the cache.
        monkeypatch: of the test.
    """

    def __init__(self, cache: Path, monkeypatch):
        self.cache, self.messages, self.private = cache, [], {}
        monkeypatch.setattr("huggingface_hub.constants.HF_HUB_CACHE", str(cache))
        for name in ("create_repo", "upload_folder", "model_info"):
            monkeypatch.setattr(HfApi, name, getattr(self, f"_{name}"))

    def snapshot(self, repository: str) -> Path:
        """The files of a repository."""
        return self.cache / f"models--{repository.replace('/', '--')}" / "snapshots" / SHA

    def _create_repo(self, repo_id, *, private=None, exist_ok=False):
        assert exist_ok
        self.private[repo_id] = private
        self.snapshot(repo_id).mkdir(parents=True, exist_ok=True)
        refs = self.snapshot(repo_id).parents[1] / "refs"
        refs.mkdir(exist_ok=True)
        (refs / "main").write_text(SHA)
        return f"https://huggingface.co/{repo_id}"

    def _upload_folder(self, *, repo_id, folder_path, commit_message):
        self.messages.append(commit_message)
        shutil.copytree(folder_path, self.snapshot(repo_id), dirs_exist_ok=True)

    def _model_info(self, repo_id, **options):
        folder = self.snapshot(repo_id)
        files = sorted(path.relative_to(folder).as_posix() for path in folder.rglob("*") if path.is_file())
        return mock.Mock(siblings=[mock.Mock(rfilename=name) for name in files], sha=SHA)
