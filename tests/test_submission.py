"""What is handed to the C function that Inductor launches with, and what is not, without a GPU: that function is stood in for."""

import contextlib
from types import SimpleNamespace

import pytest
import torch
from triton import knobs

from interpreters import run_python
from kernels import launch, pointer_launch
from kernels.backward_launch import column_sum_binary
from kernels.submission import PackedSubmission
from kernels.variants import column_sum

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
    source = (
        SETUP
        + """
    plain, weightless = (submission.packed_submission(each) for each in (kernel, compiled("bfloat16", "none", "bfloat16")))
    print(plain.submit is submit, *plain[1:])
    print(weightless.types)
    """
    )
    assert run_python(source, interprets=False).splitlines() == ["True 8 32 OOOflilllllOO (None, None)", "OOflilllllOO"]


def test_what_it_cannot_launch_goes_triton_s_way():
    source = (
        SETUP
        + """
    metadata = kernel.metadata._asdict()
    def changed(packed=(8, 1, 32), **others):
        return SimpleNamespace(function=1, packed_metadata=packed, metadata=SimpleNamespace(**{**metadata, **others}), src=kernel.src)
    odd = changed((8, 4, 32)), changed(launch_pdl=True), changed(launch_cooperative_grid=True), changed(profile_scratch_size=8)
    print([submission.packed_submission(each) for each in odd], submission.packed_submission(changed()) is None)
    """
    )
    assert run_python(source, interprets=False) == "[None, None, None, None] False\n"


def test_a_torch_without_it_or_with_another_one():
    source = """
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
    assert run_python(source, interprets=False) == "True\nFalse\nFalse\nNone\n"


class Gpus:
    """Stands in for the calls that a launch makes, and tells what they were."""

    def __init__(self, monkeypatch: pytest.MonkeyPatch, count: int) -> None:
        self.current = 1
        self.submitted: list[tuple[object, ...]] = []
        self.ordinary: list[bool] = []
        monkeypatch.setattr(torch._C, "_cuda_getCurrentRawStream", lambda index: 100 + index, raising=False)
        monkeypatch.setattr(torch._C, "_cuda_getDevice", lambda: self.current, raising=False)
        monkeypatch.setattr(torch.cuda, "device_count", lambda: count)

    def launcher(self, index: int) -> launch.Launcher:
        def ordinary(aligned: bool) -> launch.Launcher:
            self.ordinary.append(aligned)
            return lambda y, *_: y

        packed = PackedSubmission(lambda *arguments: self.submitted.append(arguments), 4, 32, "OOOflOO", (None, None))
        self.allocated = torch.empty(8)
        return launch._packed_launcher(SimpleNamespace(function=7), (3, 2, 1), (4096,), packed, index, lambda: self.allocated, ordinary)


def test_a_packed_launch(monkeypatch):
    gpus = Gpus(monkeypatch, count=4)
    x, weight = torch.empty(8), torch.empty(8)
    y = gpus.launcher(1)(None, x, weight, 0.5)
    assert y is gpus.allocated
    assert gpus.submitted == [(7, 3, 2, 1, 4, 32, "OOOflOO", (y.data_ptr(), x.data_ptr(), weight.data_ptr(), 0.5, 4096, None, None), 101)]
    assert gpus.launcher(1)(x, x, weight, 0.5) is x
    assert gpus.submitted[1][7][:2] == (x.data_ptr(),) * 2
    assert gpus.ordinary == []


@pytest.mark.parametrize("odd", ["another GPU is current", "a pointer", "a hook", "a hook in place of Triton's"])
def test_what_is_odd_is_not_packed(odd, monkeypatch):
    gpus = Gpus(monkeypatch, count=4)
    x, weight = torch.empty(9), torch.empty(8)
    packed = gpus.launcher(1)
    if odd == "another GPU is current":
        gpus.current = 0
    elif odd == "a pointer":
        x = x[1:]
    elif odd == "a hook":
        knobs.runtime.launch_exit_hook.add(print)
    else:
        monkeypatch.setattr(knobs.runtime, "launch_enter_hook", print)
    try:
        y = packed(None, x, weight, 0.5)
    finally:
        if odd == "a hook":
            knobs.runtime.launch_exit_hook.remove(print)
    assert (y is gpus.allocated) == (odd != "another GPU is current")
    assert gpus.submitted == []
    assert gpus.ordinary == [odd != "a pointer"]


def test_a_hook_that_was_there_before_the_launcher(monkeypatch):
    """A plain function, which Triton's versions without chains of hooks keep there."""
    gpus = Gpus(monkeypatch, count=1)
    with monkeypatch.context() as hooked:
        hooked.setattr(knobs.runtime, "launch_enter_hook", print)
        packed = gpus.launcher(0)
        packed(None, torch.empty(8), torch.empty(8), 0.5)
        assert gpus.submitted == []


def test_the_only_gpu_is_not_asked_for(monkeypatch):
    """No other can be current."""
    gpus = Gpus(monkeypatch, count=1)
    monkeypatch.setattr(torch._C, "_cuda_getDevice", None)
    gpus.launcher(0)(None, torch.empty(8), torch.empty(8), 0.5)
    assert [arguments[-1] for arguments in gpus.submitted] == [100]


@pytest.mark.parametrize("odd", ["", "another GPU is current", "a pointer", "a hook", "a hook in place of Triton's"])
def test_a_launch_of_any_pointers(odd, monkeypatch):
    """As backwards and sums are launched: by integers, but for what is odd, which Triton is left to launch."""
    gpus = Gpus(monkeypatch, count=4)
    by_triton: list[tuple[object, ...]] = []
    compiled = type(
        "Compiled", (), {"function": 7, "__getitem__": lambda self, grid: lambda *arguments, **_: by_triton.append(arguments)}
    )()
    monkeypatch.setattr(pointer_launch, "interpreting", lambda: False)
    monkeypatch.setattr(pointer_launch, "load_binary", lambda *_: compiled)
    monkeypatch.setattr(pointer_launch, "submission", lambda _: (lambda *arguments: gpus.submitted.append(arguments), ("middle",)))
    monkeypatch.setattr(torch.cuda, "device", lambda _: contextlib.nullcontext())
    arguments = column_sum.arguments_for(6, 8, pdl=False)
    run = pointer_launch.pointer_launcher(column_sum_binary(arguments, "float32"), (3, 1, 1), arguments, 1)
    dw, partials = torch.empty(9), torch.empty(6, 8)
    if odd == "another GPU is current":
        gpus.current = 0
    elif odd == "a pointer":
        dw = dw[1:]
    elif odd == "a hook":
        knobs.runtime.launch_enter_hook.add(print)
    elif odd == "a hook in place of Triton's":
        monkeypatch.setattr(knobs.runtime, "launch_exit_hook", print)
    try:
        run((dw, partials))
    finally:
        if odd == "a hook":
            knobs.runtime.launch_enter_hook.remove(print)
    if odd:
        assert [arguments[:2] for arguments in by_triton] == [(dw, partials)]
        assert gpus.submitted == []
    else:
        assert [arguments[:8] for arguments in gpus.submitted] == [(3, 1, 1, 101, 7, "middle", dw.data_ptr(), partials.data_ptr())]
        assert by_triton == []
