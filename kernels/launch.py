"""From a config and a geometry to a compiled kernel and a function that launches it: the one launcher, for runtime and tuner alike."""

from __future__ import annotations

import functools
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import Any, TypeAlias

import torch
import triton
from triton.backends.compiler import GPUTarget
from triton.compiler import ASTSource, CompiledKernel

from kernels.allocation import Allocate
from kernels.device import interpreting
from kernels.geometry import Geometry
from kernels.numerics import PLAIN, Numerics
from kernels.submission import PackedSubmission, launch_hooks, packed_submission, submission
from kernels.variants import VARIANTS, jit_function, split_row
from kernels.workspace import workspace
from tuning_db.model import NO_WEIGHT, Config

Launcher: TypeAlias = Callable[["torch.Tensor | None", torch.Tensor, "torch.Tensor | None", float], torch.Tensor]
"""launch(y, x, weight, eps) -> y: one kernel on the current stream of x's device; y is allocated if it is None.

Shapes, strides and dtypes are those it was built for."""

_TRITON = tuple(int(part) for part in triton.__version__.split(".")[:2])

OPTIONS = ("num_warps", "maxnreg")
"""Params of a config that are launch options; all others are constexprs of the kernel in lower case."""

TYPE_NAMES = {"float16": "*fp16", "bfloat16": "*bf16", "float32": "*fp32", "int64": "*i64", NO_WEIGHT: "constexpr"}

POINTERS = ("y_ptr", "x_ptr", "w_ptr", "workspace_ptr")
OPTIONAL_POINTERS = ("addend_ptr", "sum_ptr", "dsum_ptr", "daddend_ptr")
"""The last arguments of the kernels that serve sums as well; None in the other ops."""


@dataclass(frozen=True)
class Binary:
    """What decides the machine code: two launches with equal Binary share one compiled kernel. Rows and strides are not in it."""

    variant: str
    pointers: tuple[tuple[str, str], ...]
    """Each pointer argument with the dtype it points to; `none` where None is passed."""
    constexprs: tuple[tuple[str, int | float | bool], ...]
    options: tuple[tuple[str, int], ...]
    aligned: bool
    """Whether every pointer is a multiple of 16 bytes, so that loads may be 16 bytes wide."""


def kernel_arguments(config: Config, geometry: Geometry, *, ptx: bool, pdl: bool = False, numerics: Numerics = PLAIN) -> dict[str, Any]:
    """Every argument of the variant's kernel but pointers and eps, by name: the geometry's numbers, the params, what follows from both."""
    variant = VARIANTS[config.variant]
    heuristics = variant.kernel.fn
    known = {
        **geometry.arguments(),
        **{name.upper(): value for name, value in config.params.items() if name not in OPTIONS},
        **{name.upper(): value for name, value in numerics._asdict().items()},
        "PTX": ptx,
        "PDL": pdl,
        "max_polls": 0 if interpreting() else split_row.MAX_POLLS,
    }
    arguments = {name: known[name] for name in heuristics.fn.arg_names if name in known}
    for name, derive in heuristics.values.items():
        arguments[name] = derive({**arguments, "num_warps": config.params["num_warps"]})
    return arguments


def binary_of(config: Config, dtypes: tuple[str, str, str], arguments: Mapping[str, Any], *, aligned: bool, adds: bool = False) -> Binary:
    """The Binary that launches `config` with `arguments`; dtypes are those of x, w and y (of a backward x, w and dy).

    adds: for an op whose x is a sum (`tuning_db.model.Problem.adds`).
    """
    x_dtype, w_dtype, y_dtype = dtypes
    pointers = {"y_ptr": y_dtype, "x_ptr": x_dtype, "w_ptr": w_dtype, "workspace_ptr": "int64"}
    pointers |= {"addend_ptr": y_dtype if adds else NO_WEIGHT, "sum_ptr": x_dtype if adds else NO_WEIGHT}
    partials_dtype = NO_WEIGHT if w_dtype == NO_WEIGHT else "float32"
    pointers |= {"dx_ptr": x_dtype, "partials_ptr": partials_dtype, "dy_ptr": y_dtype}  # of a backward
    pointers |= {"dsum_ptr": x_dtype if adds else NO_WEIGHT, "daddend_ptr": y_dtype if adds and y_dtype != x_dtype else NO_WEIGHT}
    return Binary(
        variant=config.variant,
        pointers=tuple((name, pointers[name]) for name in jit_function(config.variant).arg_names if name in pointers),
        constexprs=tuple((name, value) for name, value in arguments.items() if name.isupper()),
        options=tuple((name, int(config.params[name])) for name in OPTIONS if name in config.params),
        aligned=aligned,
    )


def compile_binary(binary: Binary, target: GPUTarget) -> CompiledKernel:
    """Compile for a target, which needs no GPU, or take the binary from Triton's disk cache."""
    function = jit_function(binary.variant)
    pointers = {name: TYPE_NAMES[dtype] for name, dtype in binary.pointers}
    signature, attributes = {}, {}
    for position, param in enumerate(function.params):
        if param.name in pointers:
            signature[param.name] = pointers[param.name]
            if binary.aligned and signature[param.name] != "constexpr":
                attributes[(position,)] = [["tt.divisibility", 16]]
        else:
            signature[param.name] = "constexpr" if param.is_constexpr else param.annotation_type
    constexprs: dict[str, Any] = {**dict(binary.constexprs), **{name: None for name, dtype in binary.pointers if dtype == NO_WEIGHT}}
    source = ASTSource(function, signature, constexprs, attributes)
    return triton.compile(source, target=target, options={**dict(binary.options), "enable_fp_fusion": True})


def has_pdl(arch: str) -> bool:
    """Whether kernels for an architecture use programmatic dependent launch: its programs start before the launch ahead has ended.

    By the CUDA C++ Programming Guide compute capability 9.0 and above can. Triton 3.4 has the instructions, but can't compile them.
    """
    family, _, capability = arch.partition("_")
    return family == "sm" and int(capability) >= 90 and _TRITON >= (3, 5)


@functools.lru_cache(maxsize=4096)
def load_binary(binary: Binary, device_index: int) -> CompiledKernel:
    """The compiled kernel, loaded on a GPU of this process. Raises triton's OutOfResources where it can't run there."""
    cluster = int(dict(binary.constexprs).get("CLUSTER", 1))
    with torch.cuda.device(device_index):
        compiled = compile_binary(binary, triton.runtime.driver.active.get_current_target())
        compiled._init_handles()
        if cluster > 1:
            _start_in_clusters(compiled, cluster)
    return compiled


def _start_in_clusters(compiled: CompiledKernel, cluster: int) -> None:
    """Let Triton's launchers start the programs in clusters: they multiply the grid's first axis and set the launch attribute.

    That is what `num_ctas` in the packed metadata does. As a compile option it would also split every tensor over the cluster.
    """
    num_warps, _, shared_bytes = compiled.packed_metadata
    active = triton.runtime.driver.active.utils.cuOccupancyMaxActiveClusters(compiled.function, shared_bytes, cluster)
    if active < 1:  # on a slice of a GPU, say
        raise triton.runtime.errors.OutOfResources(cluster, 0, "programs in a cluster")
    compiled.packed_metadata = (num_warps, cluster, shared_bytes)


def build_launcher(
    config: Config,
    geometry: Geometry,
    dtypes: tuple[str, str, str],
    device_index: int,
    allocate: Allocate | None = None,
    numerics: Numerics = PLAIN,
) -> Launcher:
    """Prepare the launch of a legal config. dtypes are those of x, w (or `none`) and y. Compiles, or loads what was compiled.

    `allocate` makes the result on the current GPU where a launch is given none; `torch.empty_like(x)` does without it.
    """
    variant = VARIANTS[config.variant]
    arguments = kernel_arguments(config, geometry, ptx=not interpreting() and torch.version.hip is None, numerics=numerics)
    grid = variant.grid(arguments)
    words = variant.workspace_words(arguments) if hasattr(variant, "workspace_words") else 0
    if interpreting():
        return _interpreted_launcher(config, arguments, grid, words)
    grid = (grid[0] // arguments.get("CLUSTER", 1), *grid[1:])  # Triton's launchers count it in clusters, see _start_in_clusters
    scalars = {**arguments, **dict.fromkeys(OPTIONAL_POINTERS)}
    tail = tuple(scalars[name] for name in variant.kernel.fn.fn.arg_names if name not in (*POINTERS, "eps"))
    compiled = load_binary(binary_of(config, dtypes, arguments, aligned=True), device_index)

    @functools.cache
    def ordinary(aligned: bool) -> Launcher:
        kernel = compiled if aligned else load_binary(binary_of(config, dtypes, arguments, aligned=False), device_index)
        return _ordinary_launcher(kernel, grid, tail, device_index, words)

    if allocate is not None and dtypes[1] != NO_WEIGHT and not words:
        packed = packed_submission(compiled)
        if packed is not None:
            scalars_alone = tuple(value for name, value in arguments.items() if not name.isupper())
            return _packed_launcher(compiled, grid, scalars_alone, packed, device_index, allocate, ordinary)
    return _direct_launcher(compiled, grid, tail, device_index, words, allocate, ordinary)


def _interpreted_launcher(config: Config, arguments: dict[str, Any], grid: tuple[int, int, int], words: int) -> Launcher:
    kernel = VARIANTS[config.variant].kernel.fn.fn[grid]

    def launch(y: torch.Tensor | None, x: torch.Tensor, weight: torch.Tensor | None, eps: float) -> torch.Tensor:
        y = torch.empty_like(x) if y is None else y
        extra = {"workspace_ptr": torch.zeros(words, dtype=torch.int64)} if words else {}
        kernel(y_ptr=y, x_ptr=x, w_ptr=weight, eps=eps, **extra, **arguments)
        return y

    return launch


def _ordinary_launcher(
    compiled: CompiledKernel, grid: tuple[int, int, int], tail: tuple[Any, ...], device_index: int, words: int
) -> Launcher:
    """Triton's own way to launch a compiled kernel: any version, any vendor, launch hooks served, any device current."""
    run = compiled[grid]
    raw_stream = torch._C._cuda_getCurrentRawStream

    def launch(y: torch.Tensor | None, x: torch.Tensor, weight: torch.Tensor | None, eps: float) -> torch.Tensor:
        y = torch.empty_like(x) if y is None else y
        with torch.cuda.device(device_index):
            stream = raw_stream(device_index)
            scratch = (workspace(device_index, stream, grid[0], words),) if words else ()
            run(y, x, weight, *scratch, eps, *tail, stream=stream)
        return y

    return launch


def _direct_launcher(
    compiled: CompiledKernel,
    grid: tuple[int, int, int],
    tail: tuple[Any, ...],
    device_index: int,
    words: int,
    allocate: Allocate | None,
    ordinary: Callable[[bool], Launcher],
) -> Launcher:
    """Submits with integers for pointers: nothing is looked up, bound or specialised again.

    Anything odd goes the ordinary way, which also holds the CompiledKernel: newer Tritons unload a kernel that nobody holds. Odd are a
    pointer that is no multiple of 16, a launch hook (profilers), another device current.
    """
    submit, middle = submission(compiled)
    function, (grid_x, grid_y, grid_z) = compiled.function, grid
    raw_stream, device_now = torch._C._cuda_getCurrentRawStream, torch._C._cuda_getDevice
    runtime, enter, leave, enter_calls, leave_calls = launch_hooks()

    def launch(y: torch.Tensor | None, x: torch.Tensor, weight: torch.Tensor | None, eps: float) -> torch.Tensor:
        elsewhere = device_now() != device_index
        if y is None:
            y = torch.empty_like(x) if elsewhere or allocate is None else allocate()
        y_ptr, x_ptr = y.data_ptr(), x.data_ptr()
        w_ptr = 0 if weight is None else weight.data_ptr()
        misaligned = (y_ptr | x_ptr | w_ptr) & 15
        hooked = enter_calls or leave_calls or runtime.launch_enter_hook is not enter or runtime.launch_exit_hook is not leave
        if misaligned or hooked or elsewhere:
            return ordinary(not misaligned)(y, x, weight, eps)
        stream = raw_stream(device_index)
        if words:
            scratch = workspace(device_index, stream, grid_x, words).data_ptr()
            submit(grid_x, grid_y, grid_z, stream, function, *middle, y_ptr, x_ptr, w_ptr, scratch, eps, *tail)
        else:
            submit(grid_x, grid_y, grid_z, stream, function, *middle, y_ptr, x_ptr, w_ptr, eps, *tail)
        return y

    return launch


def _packed_launcher(
    compiled: CompiledKernel,
    grid: tuple[int, int, int],
    scalars: tuple[int, ...],
    packed: PackedSubmission,
    device_index: int,
    allocate: Allocate,
    ordinary: Callable[[bool], Launcher],
) -> Launcher:
    """The same for what most calls are: with a weight, without a workspace. Takes half a µs less (an H100's host)."""
    submit, num_warps, shared_bytes, types, last = packed
    function, (grid_x, grid_y, grid_z) = compiled.function, grid
    tail = (*scalars, *last)
    raw_stream, device_now = torch._C._cuda_getCurrentRawStream, torch._C._cuda_getDevice
    has_others = torch.cuda.device_count() > 1
    runtime, enter, leave, enter_calls, leave_calls = launch_hooks()

    def launch(y: torch.Tensor | None, x: torch.Tensor, weight: torch.Tensor | None, eps: float) -> torch.Tensor:
        elsewhere = has_others and device_now() != device_index
        if y is None:
            y = torch.empty_like(x) if elsewhere else allocate()
        y_ptr, x_ptr, w_ptr = y.data_ptr(), x.data_ptr(), weight.data_ptr()  # type: ignore[union-attr]
        misaligned = (y_ptr | x_ptr | w_ptr) & 15
        hooked = enter_calls or leave_calls or runtime.launch_enter_hook is not enter or runtime.launch_exit_hook is not leave
        if misaligned or hooked or elsewhere:
            return ordinary(not misaligned)(y, x, weight, eps)
        arguments = (y_ptr, x_ptr, w_ptr, eps) + tail  # noqa: RUF005 - unpacking takes 0.03 µs more
        submit(function, grid_x, grid_y, grid_z, num_warps, shared_bytes, types, arguments, raw_stream(device_index))
        return y

    return launch
