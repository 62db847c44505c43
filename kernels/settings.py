"""The environment variables the project reads, all of them, here."""

from __future__ import annotations

import os
from dataclasses import dataclass
from pathlib import Path

import platformdirs

BACKENDS = ("auto", "triton", "torch")


class SettingsError(ValueError):
    """An environment variable has a value that can't be used."""


@dataclass(frozen=True)
class Settings:
    """`backend` from RMSNORM_BACKEND; `databases` in order of priority from RMSNORM_TUNING_DB, then the user's own if there is a home."""

    backend: str
    databases: tuple[Path, ...]


def read_settings() -> Settings:
    """Read the environment. Raises SettingsError on an unknown backend.

    RMSNORM_BACKEND: auto (default), triton or torch.
    RMSNORM_TUNING_DB: database files separated by the platform's path separator; the user's file comes after them.
    """
    backend = os.environ.get("RMSNORM_BACKEND", "auto") or "auto"
    if backend not in BACKENDS:
        raise SettingsError(f"RMSNORM_BACKEND is {backend!r}; use one of {', '.join(BACKENDS)}")
    named = [Path(os.path.expanduser(entry)) for entry in os.environ.get("RMSNORM_TUNING_DB", "").split(os.pathsep) if entry]
    own = user_database()
    return Settings(backend, (*named, own) if own else (*named,))


def interpreting() -> bool:
    """Whether Triton runs kernels in its interpreter, on CPU tensors: TRITON_INTERPRET, as Triton reads it."""
    return os.environ.get("TRITON_INTERPRET", "0") in ("1", "true", "on", "yes", "y")


def user_database() -> Path | None:
    """The user's own database, in the platform's data directory (not the cache directory: it holds work, not copies).

    None where the user has no home directory.
    """
    try:
        folder = Path(platformdirs.user_data_dir("tuned-rmsnorm", appauthor=False))
    except RuntimeError:  # what newer platformdirs say; older ones answer with a relative path
        return None
    return folder / "tuning.sqlite" if folder.is_absolute() else None
