"""hf://owner/name: an adapter of a model hub, fetched once and read from the cache."""

from __future__ import annotations

import logging
import os
import re
import sys
from collections.abc import Iterator
from contextlib import contextmanager
from fnmatch import fnmatch
from pathlib import Path
from typing import Any, NamedTuple, NoReturn

from lotrtensor.adapters.formats.directory import CONFIG_NAME, SINGLE_FILE, check_path
from lotrtensor.adapters.formats.paths import children, is_dir, is_file
from lotrtensor.adapters.formats.tensors import INDEX_NAME, WEIGHTS_NAME
from lotrtensor.errors import FormatError, MissingPackageError, UnsupportedAdapterError

SCHEME = "hf://"
DIFFUSERS_NAME = "pytorch_lora_weights.safetensors"
"""Where diffusers' save_lora_weights puts a LoRA, in a directory without a config."""

# What an adapter's directory is read from: never a pickle, never a base model.
_FILES = (CONFIG_NAME, WEIGHTS_NAME, INDEX_NAME, "adapter_model-*.safetensors", DIFFUSERS_NAME)
# A pathlib.Path has one slash where the scheme has two.
_ADDRESS = re.compile(
    r"hf:/{1,2}(?P<repo>[^/@]+/[^/@]+)"
    r"(@(?P<revision>refs/(pr|convert)/[^/]+|[^/@]+))?(/(?P<path>.+?))?/?"
)
_LOG_IN = "log in with 'hf auth login' or set HF_TOKEN"


class Address(NamedTuple):
    """A repository, its revision (a branch, tag or commit) and a path in it."""

    repo: str
    revision: str | None
    path: str

    def __str__(self) -> str:
        """Return the address as it is written."""
        revision = f"@{self.revision}" if self.revision else ""
        return SCHEME + self.repo + revision + (f"/{self.path}" if self.path else "")


def is_remote(path: str | os.PathLike[str]) -> bool:
    """Whether a path is an address on a hub."""
    return check_path(path).startswith("hf:/")


def parse_address(path: str | os.PathLike[str]) -> Address:
    """Return the parts of ``hf://owner/name``, ``@revision`` and ``/path`` given or not.

    Raises
    ------
    FormatError
        If it has another form.

    Examples
    --------
    >>> parse_address("hf://owner/name@v1/cat.safetensors")
    Address(repo='owner/name', revision='v1', path='cat.safetensors')
    """
    match = _ADDRESS.fullmatch(os.fspath(path))
    if match is None:
        raise FormatError(
            f"{os.fspath(path)} is no address on a hub; expected hf://owner/name, and @revision or "
            "/path/in/it after that"
        )
    parts = (match["path"] or "").split("/")
    if any(part in (".", "..") or "\\" in part or "\0" in part for part in parts):
        raise FormatError(
            f"{os.fspath(path)} leads out of the repository; expected a path in it after the name"
        )
    revision = match["revision"]
    return Address(
        match["repo"], revision.replace("%2F", "/") if revision else None, match["path"] or ""
    )


def fetch(path: str | os.PathLike[str]) -> Path:
    """Return where the cache holds an adapter, fetching the files that it is read from.

    Parameters
    ----------
    path : path-like
        ``hf://owner/name``, with ``@revision`` for a branch, tag or commit, and with a path to a
        directory or a ``.safetensors`` file in the repository.

    Raises
    ------
    FormatError
        If the address is wrong, or the files cannot be had.
    MissingPackageError
        If huggingface_hub is not installed.
    UnsupportedAdapterError
        If the repository has pickled weights only.
    """
    address = parse_address(path)
    try:
        from huggingface_hub import snapshot_download
    except ImportError as error:
        raise MissingPackageError(
            f"{address} needs the package huggingface_hub; install it with: "
            "pip install 'lotrtensor[hub]'"
        ) from error
    single = address.path.endswith(SINGLE_FILE)
    prefix = address.path + "/" if address.path and not single else ""
    patterns = [address.path] if single else [prefix + name for name in _FILES]
    try:
        with _one_voice():
            snapshot = snapshot_download(
                address.repo,
                revision=address.revision,
                allow_patterns=patterns,
                tqdm_class=_quiet_bar(),
            )
    except Exception as error:
        _refuse(address, error)
    found = Path(snapshot) / address.path
    _check_complete(found, address, single)
    return found


@contextmanager
def _one_voice() -> Iterator[None]:
    """Keep huggingface_hub's warnings back: what they say is said here, or of no use here."""
    logger = logging.getLogger("huggingface_hub")
    level = logger.level
    logger.setLevel(logging.ERROR)
    try:
        yield
    finally:
        logger.setLevel(level)


def _quiet_bar() -> type[Any]:
    """huggingface_hub's progress bar, silent where stderr is no terminal."""
    from huggingface_hub.utils.tqdm import tqdm

    class Quiet(tqdm):
        def __init__(self, *args: Any, **kwargs: Any) -> None:
            if not sys.stderr.isatty():
                kwargs["disable"] = True
            super().__init__(*args, **kwargs)  # type: ignore[no-untyped-call]

    return Quiet


def _refuse(address: Address, error: Exception) -> NoReturn:
    """Say in one sentence what a failure of huggingface_hub means and what helps."""
    from huggingface_hub import constants, errors

    known: list[tuple[type[Exception], str]] = [
        (errors.GatedRepoError, f"is gated: accept its terms on its page, then {_LOG_IN}"),
        (
            errors.RepositoryNotFoundError,
            f"is no repository that you can read; check the name, and if it is private, {_LOG_IN}",
        ),
        (
            errors.RevisionNotFoundError,
            f"has no revision {address.revision or 'main'}; name a branch, tag or commit of it",
        ),
        (
            errors.HFValidationError,
            "has a name that no repository has; expected hf://owner/name",
        ),
        (errors.LocalEntryNotFoundError, _unreachable(constants.HF_HUB_OFFLINE, error)),
    ]
    text = next((text for kind, text in known if isinstance(error, kind)), None)
    if text is None:
        if not isinstance(error, OSError | errors.HfHubHTTPError):
            raise error
        text = f"could not be fetched ({_first_line(error)}); try again, or name a local copy"
    raise FormatError(f"{address} {text}") from error


def _unreachable(offline: bool, error: Exception) -> str:
    if offline:
        return (
            "is not in the cache, and HF_HUB_OFFLINE forbids to fetch it: unset that, or name a "
            "local copy"
        )
    return (
        f"is not in the cache, and the hub cannot be reached ({_first_line(error)}); check the "
        "connection and HF_ENDPOINT, or name a local copy"
    )


def _first_line(error: Exception) -> str:
    lines = str(error.__cause__ or error).strip().splitlines()
    return lines[0] if lines else type(error).__name__


def _check_complete(found: Path, address: Address, single: bool) -> None:
    if single:
        if not is_file(found):
            raise FormatError(f"{address}: the repository has no such file")
        return
    names = [p.name for p in children(found)] if is_dir(found) else []
    if any(fnmatch(name, pattern) for name in names for pattern in _FILES[1:]):
        return
    if CONFIG_NAME in names:
        raise UnsupportedAdapterError(
            f"{address} has no {WEIGHTS_NAME}; pickled weights are not fetched, as they can run "
            "code when opened: load the adapter with PEFT and save it again with save_pretrained"
        )
    raise FormatError(
        f"{address} has no {CONFIG_NAME} and no {DIFFUSERS_NAME}; if it holds a LoRA in another "
        f"file, name that: {SCHEME}{address.repo}/FILE{SINGLE_FILE}"
    )
