"""The package's one error, with its cures."""

from __future__ import annotations

import os
from pathlib import Path

OTHER_FILE = "name another file by RMSNORM_TUNING_DB or --db"


class DatabaseError(Exception):
    """A tuning database can't be used; the message names the file and the way out."""

    @classmethod
    def of_version(cls, path: Path, version: int, known: int) -> DatabaseError:
        if version > known:
            cure = f"upgrade this package, or {OTHER_FILE}"
        else:
            cure = f"`python -m tuner sweep` brings it up to date, or {OTHER_FILE}"
        return cls(f"{path} has schema version {version}, this package knows version {known}: {cure}")

    @classmethod
    def of_path(cls, path: Path, error: Exception) -> DatabaseError:
        if os.path.isdir(path):
            return cls(f"{path} is a directory: {OTHER_FILE}")
        if "locked" in str(error):
            return cls(f"{path} is locked by another process: try again when that has ended, or {OTHER_FILE}")
        if "full" in str(error) or "disk I/O" in str(error):
            return cls(f"{path} can't be written further ({error}): free some space; what was recorded before is kept")
        if isinstance(error, OSError) or "readonly" in str(error) or "unable to open" in str(error):
            return cls(f"{path} can't be opened ({error}): allow this user to use it and its folder, or {OTHER_FILE}")
        return cls(f"{path} can't be used ({error}): restore it from a copy, move it away and sweep again, or {OTHER_FILE}")
