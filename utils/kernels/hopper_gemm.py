"""
GEMM of few rows on Hopper GPUs, the CUDA C++ kernel of hopper_gemm.cu: compiled by NVRTC, called through the driver.

Called by skinny_gemm.py, whose operators it computes. A decode step multiplies few rows by each weight, so memory
bandwidth bounds it, and what is lost is the time between two GEMMs. This kernel loads the first tiles of its weight
before the kernel ahead of it has ended. Triton cannot: its pipeline starts with the loop, behind the wait for the
inputs; tilings, TMA and prefetching into L2 gained nothing there (docs/log/inference.md, 2026-12-01).

Shapes: x (M, K), weight (N, K), y (M, N). A gated weight is (2 N, K), gate above up: y = silu(x gate^T) * (x up^T).
"""

import ctypes
from dataclasses import dataclass
from functools import cache
from pathlib import Path
from typing import Any

import torch
from cuda.bindings import driver, nvrtc

SOURCE = Path(__file__).with_suffix(".cu")
OPTIONS = [b"--gpu-architecture=sm_90a", b"-std=c++17"]
LINE = 128  # bytes of K in a tile
RING_BYTES = 200 << 10  # of the only CTA on a multiprocessor
HALF_RING_BYTES = 104 << 10  # where two share one, so that one loads while the other ends
CLUSTERED = 0.85  # of the multiprocessors that clusters of 3 CTAs and more can fill
MAX_STAGES = 24
MAX_ROWS_OF_TILE = 128
WGMMA_TYPES = {torch.bfloat16: "bf16", torch.float16: "f16", torch.float8_e4m3fn: "e4m3"}


@dataclass(frozen=True)
class Kernel:
    """What the kernel is compiled for; `dtype` is the weight's."""

    dtype: torch.dtype
    warpgroups: int  # that multiply, 64 rows of the weight each; even where gated
    rows: int  # of x in a tile: 8 to 128, a power of 2
    stages: int
    splits: int
    gated: bool
    scaled: bool
    biased: bool

    @property
    def shared_bytes(self) -> int:
        """Dynamic shared memory of a CTA: the ring, or the sums in its place, barriers, and 1,024 to align."""
        tile = 64 * self.warpgroups
        ring = self.stages * (tile + self.rows) * LINE
        return max(ring, self.rows * (tile + 4) * 4) + 16 * self.stages + 1024

    def source(self) -> bytes:
        """CUDA C++ with these constants."""
        constants = {
            "ROWS": self.rows,
            "WARPGROUPS": self.warpgroups,
            "STAGES": self.stages,
            "SPLITS": self.splits,
            "GATED": int(self.gated),
            "SCALED": int(self.scaled),
            "BIASED": int(self.biased),
            "FLOAT16": int(self.dtype == torch.float16),
            "K_BLOCK": LINE // self.dtype.itemsize,
        }
        defines = "".join(f"#define {name} {value}\n" for name, value in constants.items())
        return f"{defines}{self._multiply()}{SOURCE.read_text(encoding='utf-8')}".encode()

    def _multiply(self) -> str:
        """The function `multiply`: sums += weight tile (64, 32 bytes) x tile (rows, 32 bytes)^T."""
        count, kind = self.rows // 2, WGMMA_TYPES[self.dtype]
        registers = ", ".join(f"%{number}" for number in range(count))
        outputs = ", ".join(f'"+f"(sums[{number}])' for number in range(count))
        transposed = "" if self.scaled else ", 0, 0"  # FP8 has no such operands
        return (
            f"__device__ __forceinline__ void multiply"
            f"(float (&sums)[{count}], unsigned long long weight, unsigned long long x)\n{{\n"
            f'    asm volatile("wgmma.mma_async.sync.aligned.m64n{self.rows}k{32 // self.dtype.itemsize}'
            f'.f32.{kind}.{kind} {{{registers}}}, %{count}, %{count + 1}, 1, 1, 1{transposed};"\n'
            f'        : {outputs} : "l"(weight), "l"(x));\n}}\n'
        )


def kernel_for(
    shape: tuple[int, int, int], dtype: torch.dtype, gated: bool, biased: bool, multiprocessors: int
) -> Kernel:
    """
    Choose the tiles: one CTA with a deep ring on nearly every multiprocessor, or all tiles of a large weight at once.

    Args:
        shape: M, rows of the weight, K.
    """
    M, weight_rows, K = shape
    rows = min(MAX_ROWS_OF_TILE, max(8, 1 << (M - 1).bit_length()))

    def ctas_of(warpgroups: int, splits: int) -> int:
        return -(-weight_rows // (64 * warpgroups)) * -(-M // rows) * splits

    choices = [(2, 1)] if gated else [(warpgroups, splits) for warpgroups in (2, 1) for splits in range(1, 9)]
    # Clusters of 3 CTAs and more leave multiprocessors of a GPC unused.
    fitting = [
        choice
        for choice in choices
        if ctas_of(*choice) <= multiprocessors * (1 if choice[1] < 3 else CLUSTERED) and choice[1] * LINE <= K
    ]
    warpgroups, splits = max(fitting, key=lambda choice: ctas_of(*choice), default=(2, 1))
    ring = RING_BYTES if fitting else HALF_RING_BYTES
    stages = min(MAX_STAGES, ring // ((64 * warpgroups + rows) * LINE))
    return Kernel(dtype, warpgroups, rows, stages, splits, gated, dtype.itemsize == 1, biased)


def _checked(result: tuple) -> Any:
    """
    Return the value of a call of NVRTC or the driver.

    Raises:
        RuntimeError: the call failed.
    """
    status, *values = result
    if int(status):
        raise RuntimeError(f"{type(status).__name__}: {status.name}")
    return values[0] if values else None


@cache
def _compiled(kernel: Kernel, device: int) -> Any:
    """The kernel as a function of the driver, in the context of a device."""
    program = _checked(nvrtc.nvrtcCreateProgram(kernel.source(), SOURCE.name.encode(), 0, [], []))
    if int(nvrtc.nvrtcCompileProgram(program, len(OPTIONS), OPTIONS)[0]):
        log = bytearray(_checked(nvrtc.nvrtcGetProgramLogSize(program)))
        nvrtc.nvrtcGetProgramLog(program, log)
        raise RuntimeError(f"{SOURCE.name} does not compile: {log.decode()}")
    code = bytearray(_checked(nvrtc.nvrtcGetCUBINSize(program)))
    _checked(nvrtc.nvrtcGetCUBIN(program, code))
    function = _checked(driver.cuModuleGetFunction(_checked(driver.cuModuleLoadData(bytes(code))), b"hopper_gemm"))
    limit = driver.CUfunction_attribute.CU_FUNC_ATTRIBUTE_MAX_DYNAMIC_SHARED_SIZE_BYTES
    _checked(driver.cuFuncSetAttribute(function, limit, kernel.shared_bytes))
    return function


def _tensor_map(tensor: torch.Tensor, rows: int) -> Any:
    """A TMA descriptor of a contiguous matrix in boxes of `rows` rows and 128 bytes."""
    types, size = driver.CUtensorMapDataType, tensor.element_size()
    return _checked(
        driver.cuTensorMapEncodeTiled(
            types.CU_TENSOR_MAP_DATA_TYPE_UINT16 if size == 2 else types.CU_TENSOR_MAP_DATA_TYPE_UINT8,
            2,
            tensor.data_ptr(),
            [driver.cuuint64_t(tensor.shape[1]), driver.cuuint64_t(tensor.shape[0])],
            [driver.cuuint64_t(tensor.shape[1] * size)],
            [driver.cuuint32_t(LINE // size), driver.cuuint32_t(rows)],
            [driver.cuuint32_t(1), driver.cuuint32_t(1)],
            driver.CUtensorMapInterleave.CU_TENSOR_MAP_INTERLEAVE_NONE,
            driver.CUtensorMapSwizzle.CU_TENSOR_MAP_SWIZZLE_128B,
            driver.CUtensorMapL2promotion.CU_TENSOR_MAP_L2_PROMOTION_L2_256B,
            driver.CUtensorMapFloatOOBfill.CU_TENSOR_MAP_FLOAT_OOB_FILL_NONE,
        )
    )


def _launch_attributes(splits: int) -> list[Any]:
    """Programmatic dependent launch, and clusters of `splits` CTAs."""
    early, cluster = driver.CUlaunchAttribute(), driver.CUlaunchAttribute()
    early.id = driver.CUlaunchAttributeID.CU_LAUNCH_ATTRIBUTE_PROGRAMMATIC_STREAM_SERIALIZATION
    early.value.programmaticStreamSerializationAllowed = 1
    cluster.id = driver.CUlaunchAttributeID.CU_LAUNCH_ATTRIBUTE_CLUSTER_DIMENSION
    cluster.value.clusterDim.x, cluster.value.clusterDim.y, cluster.value.clusterDim.z = splits, 1, 1
    return [early, cluster]


def can_compile() -> bool:
    """Whether NVRTC is found, which torch for GPUs brings along."""
    try:
        _checked(nvrtc.nvrtcVersion())
    except RuntimeError:
        return False
    return True


def supports_weight(weight: torch.Tensor, gated: bool) -> bool:
    """Whether TMA can load a contiguous weight, and rows of y are a multiple of the 8 bytes that a thread stores."""
    outputs = weight.shape[0] // (1 + gated)
    return weight.shape[1] * weight.element_size() % 16 == 0 and outputs % 4 == 0 and weight.data_ptr() % 16 == 0


def hopper_gemm(
    x: torch.Tensor,
    weight: torch.Tensor,
    y: torch.Tensor,
    gated: bool,
    bias: torch.Tensor | None = None,
    scales: tuple[torch.Tensor, torch.Tensor] | None = None,
    kernel: Kernel | None = None,
) -> None:
    """
    Compute y from x and a weight that `supports_weight`, all contiguous.

    Args:
        x: (M, K) in the dtype of `weight`: bfloat16, float16 or e4m3.
        weight: (N, K), or (2 N, K) where `gated`.
        y: (M, N) bfloat16, or the dtype of `x`; overwritten.
        bias: (N,) in the dtype of `y`.
        scales: of the rows of `x` (M, 1) and of `weight` (1, N) or (1, 2 N), float32, in e4m3.
        kernel: (default: `kernel_for`).

    Raises:
        RuntimeError: NVRTC or the driver refuses.
    """
    (M, K), device = x.shape, x.device
    if kernel is None:
        multiprocessors = torch.cuda.get_device_properties(device).multi_processor_count
        kernel = kernel_for((M, weight.shape[0], K), weight.dtype, gated, bias is not None, multiprocessors)
    outputs, N = 32 * kernel.warpgroups * (2 - gated), y.shape[1]
    row_tiles, k_blocks = -(-M // kernel.rows), -(-K * x.element_size() // LINE)
    with torch.cuda.device(device):
        function = _compiled(kernel, device.index)
    maps = _tensor_map(weight, 64), _tensor_map(x, kernel.rows)
    pointers = [None if tensor is None else tensor.data_ptr() for tensor in (*(scales or (None, None)), bias, y)]
    values = [*map(ctypes.c_void_p, pointers), *map(ctypes.c_int, (M, N, k_blocks, row_tiles))]
    addresses = [*(int(tensor_map.getPtr()) for tensor_map in maps), *map(ctypes.addressof, values)]
    arguments = (ctypes.c_void_p * len(addresses))(*addresses)
    config = driver.CUlaunchConfig()
    config.gridDimX, config.gridDimY, config.gridDimZ = -(-N // outputs) * row_tiles * kernel.splits, 1, 1
    config.blockDimX, config.blockDimY, config.blockDimZ = 128 * kernel.warpgroups + 32, 1, 1
    config.sharedMemBytes = kernel.shared_bytes
    config.hStream = torch.cuda.current_stream(device).cuda_stream
    config.attrs = _launch_attributes(kernel.splits)
    config.numAttrs = len(config.attrs)
    _checked(driver.cuLaunchKernelEx(config, function, ctypes.addressof(arguments), 0))
