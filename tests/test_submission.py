"""What is handed to the C function that Inductor launches with, without a GPU: it is stood in for, the kernels are compiled for real."""

import os
import subprocess
import sys
import textwrap
from pathlib import Path

ROOT = Path(__file__).parents[1]


def run_python(source: str) -> str:
    """In a process where Triton does not interpret."""
    source = textwrap.dedent(source)
    environment = {name: value for name, value in os.environ.items() if name != "TRITON_INTERPRET"}
    return subprocess.run([sys.executable, "-c", source], cwd=ROOT, env=environment, capture_output=True, text=True, check=True).stdout


SETUP = """
    from types import SimpleNamespace
    from triton.backends.compiler import GPUTarget
    from kernels import launch, submission
    from kernels.geometry import geometry_of
    from tuning_db.model import Config

    def compiled(*dtypes):
        geometry = geometry_of((4, 4096), (4096, 1), (4096, 1), 1)
        config = Config.of("whole_row", num_warps=8, weight_first=True)
        arguments = launch.kernel_arguments(config, geometry, ptx=True)
        return launch.compile_binary(launch.binary_of(config, dtypes, arguments, aligned=True), GPUTarget("cuda", 90, 32))

    kernel, submit = compiled(*("bfloat16",) * 3), lambda *arguments: None
    submission._launch_kernel = lambda: submit
"""


def test_it_takes_all_that_is_no_constexpr():
    """Three pointers, eps, int64 rows, int32 cols, five int64 strides and the like; then Triton's two pointers to scratch memory."""
    assert run_python(
        SETUP
        + """
    plain, weightless = (submission.packed_submission(each) for each in (kernel, compiled("bfloat16", "none", "bfloat16")))
    print(plain.submit is submit, *plain[1:])
    print(weightless.types)
    """
    ).splitlines() == ["True 8 32 OOOflilllllOO (None, None)", "OOflilllllOO"]


def test_what_it_cannot_launch_goes_triton_s_way():
    assert (
        run_python(
            SETUP
            + """
    metadata = kernel.metadata._asdict()
    def changed(packed=(8, 1, 32), **others):
        return SimpleNamespace(function=1, packed_metadata=packed, metadata=SimpleNamespace(**{**metadata, **others}), src=kernel.src)
    odd = changed((8, 4, 32)), changed(launch_pdl=True), changed(launch_cooperative_grid=True), changed(profile_scratch_size=8)
    print([submission.packed_submission(each) for each in odd], submission.packed_submission(changed()) is None)
    """
        )
        == "[None, None, None, None] False\n"
    )


def test_a_torch_without_it_or_with_another_one():
    assert (
        run_python(
            """
    import torch
    from types import SimpleNamespace
    from kernels import submission

    def known(function, x, y, z, num_warps, shared_bytes, types, arguments, stream):
        assert (x, y, z) == (0, 1, 1)

    def refuse(*arguments):
        raise TypeError
    for launch in (known, refuse, None):
        torch._C._StaticCudaLauncher = SimpleNamespace(_launch_kernel=launch)
        submission._launch_kernel.cache_clear()
        print(submission._launch_kernel() is known)
    del torch._C._StaticCudaLauncher
    submission._launch_kernel.cache_clear()
    print(submission._launch_kernel())
    """
        )
        == "True\nFalse\nFalse\nNone\n"
    )
