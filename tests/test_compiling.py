"""What is read from a binary, on made-up machine code."""

from types import SimpleNamespace

import pytest

from tuner import compiling
from tuner.compiling import load_bytes_of


@pytest.mark.parametrize(
    ("sass", "expected"),
    [
        ("LDG.E.128 R4, [R2] ; LDG.E.64.STRONG.SYS R8, [R6]", 16),
        ("LDG.E R4 ; LDG.E.U16 R8", 4),
        ("LDG.E.EF.U16 R8", 2),
        ("LDG.E.S8.CONSTANT R8", 1),
        ("LDGSTS.E.BYPASS.128 [R3], [R2]", 16),
        ("STG.E.128 [R2], R4", 0),
    ],
)
def test_the_widest_load_of_nvidias(monkeypatch: pytest.MonkeyPatch, sass: str, expected: int) -> None:
    monkeypatch.setattr(compiling, "_cuobjdump", lambda option, cubin: sass)
    assert load_bytes_of(SimpleNamespace(asm={"cubin": b""})) == expected


@pytest.mark.parametrize(
    ("text", "expected"),
    [
        ("buffer_load_dwordx4 v[0:3], v4 ; global_load_ushort v5", 16),
        ("global_load_dwordx2 v[0:1]", 8),
        ("global_load_dword v0 ; buffer_load_ubyte v1", 4),
        ("buffer_load_short_d16 v0", 2),
        ("global_load_ubyte v0", 1),
        ("global_load_b128 v[0:3]", 16),
        ("global_store_dwordx4 v[0:3]", 0),
    ],
)
def test_the_widest_load_of_amds(text: str, expected: int) -> None:
    assert load_bytes_of(SimpleNamespace(asm={"amdgcn": text})) == expected
