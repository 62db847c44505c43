"""Checks of what RMSNorm needs on this machine, each with its cure."""

from __future__ import annotations

import importlib.metadata
import importlib.util
import os
import platform
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path

from tuning_db.errors import DatabaseError
from tuning_db.jsonl import shipped_records
from tuning_db.schema import is_local
from tuning_db.store import read_records

VARIABLES = ("RMSNORM_BACKEND", "RMSNORM_TUNING_DB")
OUR_DISTRIBUTION = "tuned-rmsnorm"


@dataclass(frozen=True)
class Finding:
    """What was found; a problem if there is a cure."""

    subject: str
    text: str
    cure: str = ""


def examine() -> Iterator[Finding]:
    """All findings. What imports torch, triton or kernels comes after the check that they are there and ours."""
    yield Finding("python", f"{platform.python_version()} on {platform.system()} {platform.machine()}")
    missing = [name for name in ("torch", "triton") if importlib.util.find_spec(name) is None]
    for name in missing:
        yield Finding(name, "is not installed", f"pip install {name}")
    package = _kernels_package()
    yield from package
    if missing or package[0].cure:
        return
    yield from _gpus()
    yield from _databases()
    yield from _environment()


def _kernels_package() -> list[Finding]:
    spec = importlib.util.find_spec("kernels")
    origin = Path(spec.origin).parent if spec and spec.origin else None
    ours = Path(__file__).resolve().parent.parent / "kernels"
    findings = []
    if origin is None or origin.resolve() != ours:
        cure = f"pip uninstall kernels, or put {ours.parent} first in PYTHONPATH"
        findings.append(Finding("package", f"`import kernels` takes {origin}, not {ours}", cure))
    else:
        findings.append(Finding("package", f"`import kernels` takes {ours}"))
    others = set(importlib.metadata.packages_distributions().get("kernels", ())) - {OUR_DISTRIBUTION}
    if others:
        text = f"also comes with the distribution {', '.join(sorted(others))}; sys.path decides which one is imported"
        findings.append(Finding("package", f"`kernels` {text}", f"pip uninstall {' '.join(sorted(others))}, or use an environment apart"))
    return findings


def _gpus() -> Iterator[Finding]:
    import torch
    import triton

    from kernels.device import cuda_version, describe, gpu_count

    versions = f"torch {torch.__version__}, triton {triton.__version__}, CUDA or ROCm {cuda_version()}"
    yield Finding("versions", versions)
    for index in range(gpu_count()):
        device = describe(index)
        yield Finding("gpu", f"{index}: {device.name} ({device.uid})")
    if not gpu_count():
        if Path("/dev/nvidia0").exists() or Path("/dev/kfd").exists():
            if cuda_version() == "none":
                cure = "install a CUDA or ROCm build of torch (pytorch.org/get-started)"
            else:
                cure = "check nvidia-smi or rocminfo, and CUDA_VISIBLE_DEVICES"
            yield Finding("gpu", "there is one, but torch does not see it", cure)
        else:
            yield Finding("gpu", 'none: `sweep` compiles only, and rmsnorm takes CPU tensors with backend="torch"')


def _databases() -> Iterator[Finding]:
    from kernels.device import describe, gpu_count
    from kernels.settings import read_settings
    from tuner.architectures import architectures
    from tuner.session import is_writable

    devices = [describe(index) for index in range(gpu_count())] or [architectures()["sm_90"].device]
    paths = read_settings().databases
    for path in paths:
        if not os.path.exists(path):
            yield Finding("database", f"{path} does not exist yet" + ("" if is_writable(path) else ", and can't be created"))
            continue
        kind = "local disk" if is_local(path) else "shared file system"
        try:
            found = {device.uid: [r for r in read_records(path, device.arch)[1] if r.device_uid == device.uid] for device in devices}
        except DatabaseError as error:
            text, _, cure = str(error).partition(": ")
            yield Finding("database", text, cure or "move it away and sweep again")
            continue
        numbers = ", ".join(f"{len(records)} records for {uid}" for uid, records in found.items())
        journal = "WAL" if _is_wal(path) else "rollback journal"
        access = "writable" if is_writable(path) else "read-only"
        cure = "" if kind == "local disk" or journal != "WAL" else "export, move it away, import: the new file gets the right journal"
        yield Finding("database", f"{path}: {access}, {journal}, {kind}, {numbers}", cure)
    if not any(map(is_writable, paths)):
        yield Finding("database", "none of them can be written", "name a writable file by RMSNORM_TUNING_DB or --db")
    for arch in sorted({device.arch for device in devices}):
        try:
            yield Finding("shipped", f"{len(shipped_records(arch)[1])} records for {arch}")
        except DatabaseError as error:
            yield Finding("shipped", str(error), "install the package again")


def _environment() -> Iterator[Finding]:
    for name, value in sorted(os.environ.items()):
        if name in VARIABLES:
            yield Finding("variable", f"{name}={value}")
        elif name.startswith("RMSNORM_"):
            yield Finding("variable", f"{name}={value} is read by nothing", f"unset it; known are {', '.join(VARIABLES)}")
        elif name == "TRITON_INTERPRET":
            yield Finding("variable", f"{name}={value}: kernels run in Triton's interpreter", "unset it, except for tests")


def _is_wal(path: Path) -> bool:
    """From the file's header: byte 18 is 2 in WAL mode (sqlite.org/fileformat.html)."""
    with path.open("rb") as file:
        return file.read(19)[18:] == b"\x02"
