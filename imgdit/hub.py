"""Where a model is: in a folder, in the Hub's cache, or on the Hub; told at once where it is nowhere."""

from __future__ import annotations

import re
from contextlib import suppress
from pathlib import Path
from typing import Any

from imgdit.checkpoints import EMBEDDED, SCENES
from imgdit.naming import SIMILAR, closest

TIMEOUT = 5.0
"""Seconds in which the Hub has to answer whether it has a model."""
INDEX = "model_index.json"
"""File of a pipeline's folder that names its parts."""
HUB_ID = r"\w[\w.-]*/\w[\w.-]*"


def find_pipeline(source: str | Path) -> str:
    """A pipeline's folder, or its Hub id where the Hub has it, see `find_model`."""
    return find_model(source, INDEX, "pipeline")


def find_model(source: str | Path, file: str, what: str = "model") -> str:
    """A model's folder, or its Hub id where the Hub has it.

    Without a network a model that was downloaded before is taken from the Hub's cache.

    Args:
        source: folder in diffusers' layout (`~` is expanded), Hub id such as "black-forest-labs/FLUX.1-dev", or
            "embedded" for the model that comes along.
        file: what it must hold, such as "transformer/config.json".
        what: what messages call it.

    Raises:
        ValueError: neither a folder here nor a model on the Hub, or the Hub cannot be reached.
    """
    folder = SCENES if source == EMBEDDED else Path(source).expanduser()
    if (folder / file).is_file():
        return str(folder)
    if folder.exists():
        why = f"the folder holds no {file}" if folder.is_dir() else "it is a file"
        raise ValueError(f"{str(source)!r} is no {what}: {why}; expected a folder as `save_pretrained` writes it")
    if not re.fullmatch(HUB_ID, str(source)):
        near = closest(str(source), [EMBEDDED], SIMILAR)
        hint = f"; did you mean {EMBEDDED!r}?" if near else ""
        raise ValueError(f"there is no folder {str(source)!r} here, and Hub ids look like owner/name{hint}")
    return _on_the_hub(str(source), file, what)


def _on_the_hub(name: str, file: str, what: str) -> str:
    """The Hub id, or the folder of its cached snapshot where the Hub cannot be asked."""
    from huggingface_hub import get_hf_file_metadata, hf_hub_url, snapshot_download, try_to_load_from_cache
    from huggingface_hub.errors import EntryNotFoundError, GatedRepoError, HFValidationError, RepositoryNotFoundError

    nowhere = f"there is no folder {name!r} here, and"
    try:
        cached = isinstance(try_to_load_from_cache(name, file), str)
        get_hf_file_metadata(hf_hub_url(name, file), timeout=TIMEOUT)
    except (GatedRepoError, RepositoryNotFoundError) as error:
        if cached:
            return snapshot_download(name, local_files_only=True)
        reason = "asks to accept a licence" if isinstance(error, GatedRepoError) else "has none, or a private one"
        raise ValueError(
            f"{nowhere} the Hub {reason}; see huggingface.co/{name}, and log in with `hf auth login`"
        ) from error
    except EntryNotFoundError as error:
        raise ValueError(f"{nowhere} what the Hub has of that name is no {what}: it holds no {file}") from error
    except HFValidationError as error:
        raise ValueError(f"{nowhere} it is no Hub id: {error}") from error
    except Exception as error:  # of whichever library carries the request: no network, no answer, offline mode
        if cached:
            return snapshot_download(name, local_files_only=True)
        raise ValueError(f"{nowhere} the Hub cannot be reached: {type(error).__name__}: {error}") from error
    return name


def hub_file(repository: str, file: str, **options: Any) -> Path:
    """A file of a repository on the Hub, downloaded; of its cached snapshot where the Hub cannot be asked.

    Args:
        options: of `hf_hub_download`.

    Raises:
        EntryNotFoundError: the repository has no such file.
        Exception: of whichever library carries the request; there is no such repository, no network, nothing cached.
    """
    from huggingface_hub import get_hf_file_metadata, hf_hub_download, hf_hub_url
    from huggingface_hub.errors import EntryNotFoundError, LocalEntryNotFoundError

    if not options.get("local_files_only"):
        url = hf_hub_url(repository, file, revision=options.get("revision"))
        try:
            get_hf_file_metadata(
                url, token=options.get("token"), timeout=TIMEOUT
            )  # the download tries for half a minute
        except EntryNotFoundError:
            raise
        except Exception as error:
            try:
                return Path(hf_hub_download(repository, file, **{**options, "local_files_only": True}))
            except LocalEntryNotFoundError:
                raise error from None
    return Path(hf_hub_download(repository, file, **options))


def find_dataset(name: str) -> str:
    """The id of a data set that the Hub has, or that was downloaded before.

    Raises:
        ValueError: no id, no such data set, or the Hub cannot be reached.
    """
    import datasets
    from huggingface_hub import HfApi
    from huggingface_hub.errors import RepositoryNotFoundError

    if not re.fullmatch(HUB_ID, name):
        raise ValueError(f"ids of data sets on the Hub look like owner/name, got {name!r}")
    try:
        HfApi().dataset_info(name, timeout=TIMEOUT)
    except RepositoryNotFoundError as error:
        raise ValueError(
            f"the Hub has no data set of that name, or a private one; see huggingface.co/datasets/{name}, and log in "
            "with `hf auth login`"
        ) from error
    except Exception as error:  # of whichever library carries the request: no network, no answer, offline mode
        if not (Path(datasets.config.HF_DATASETS_CACHE) / name.replace("/", "___")).is_dir():
            raise ValueError(f"the Hub cannot be reached: {type(error).__name__}: {error}") from error
    return name


def push_folder(
    folder: str | Path,
    repository: str,
    *,
    private: bool | None = None,
    token: str | None = None,
    message: str | None = None,
) -> str:
    """Upload a folder to a model repository on the Hub, which is made where it does not exist.

    Args:
        folder: weights with their model card, see `imgdit.cards`.
        repository: owner/name.
        private: of a new repository; `None`: what the owner's account has as default.
        token: of the Hub; `None`: of `hf auth login`.
        message: of the commit.

    Returns:
        The repository's address.

    Raises:
        ValueError: no id, no folder, the Hub cannot be reached or refuses. The folder stays as it is.
    """
    folder = Path(folder)
    check_repository(repository)
    if not folder.is_dir():
        raise ValueError(f"there is no folder {str(folder)!r} to upload")
    from huggingface_hub import HfApi
    from huggingface_hub.errors import HfHubHTTPError, LocalTokenNotFoundError, RepositoryNotFoundError

    api = HfApi(token=token)
    try:
        with suppress(RepositoryNotFoundError):  # answers within `TIMEOUT`, which what follows does not
            api.model_info(repository, timeout=TIMEOUT)
        url = str(api.create_repo(repository, private=private, exist_ok=True))
        api.upload_folder(repo_id=repository, folder_path=folder, commit_message=message or "Upload by imgdit")
    except LocalTokenNotFoundError as error:
        raise ValueError(f"{repository} needs a login: run `hf auth login`, or give a token") from error
    except HfHubHTTPError as error:
        status = getattr(error.response, "status_code", None)
        reason = "the token may not write there; see `hf auth whoami`" if status in (401, 403) else _first_line(error)
        raise ValueError(f"the Hub did not take {repository}: {reason}") from error
    except Exception as error:  # of whichever library carries the request: no network, no answer, offline mode
        raise ValueError(
            f"nothing was uploaded to {repository}, the Hub cannot be reached: {type(error).__name__}: "
            f"{_first_line(error)}"
        ) from error
    return url


def check_repository(name: str) -> None:
    """Refuse what cannot be a repository's name."""
    if not re.fullmatch(HUB_ID, name):
        raise ValueError(f"a repository on the Hub is called owner/name, got {name!r}")


def _first_line(error: Exception) -> str:
    return str(error).strip().partition("\n")[0]
