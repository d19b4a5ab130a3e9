"""
INT8 and INT4 weights in 16 or 32 bits, as a CUDA C kernel for GPUs that Triton does not know.

Called by utils/layers/quantization.py before compute capability 7.5, or with CHATGLM_KERNELS=cpm_kernels. cpm_kernels
binds NVRTC, which compiles the source below at its first use, and loads the result; the kernels that cpm_kernels ships
compiled have no code for Hopper.

Importing this module raises what cpm_kernels raises where it does not run: no CUDA driver, no pkg_resources.
"""

import ctypes
import warnings
from functools import cache

import torch

with warnings.catch_warnings():
    warnings.filterwarnings("ignore", message="pkg_resources is deprecated")
    from cpm_kernels.kernels.base import KernelFunction, LazyKernelCModule
    from cpm_kernels.library import cudart, nvrtc
# Conversions are spelled out: NVRTC has no cuda_fp16.h by itself, and GPUs before Ampere have no bfloat16.
SOURCE = r"""
typedef unsigned short float16, bfloat16;
typedef float float32;

__device__ float widen(float16 bits)
{
    float value;
    asm("cvt.f32.f16 %0, %1;" : "=f"(value) : "h"(bits));
    return value;
}

__device__ float16 to_float16(float value)
{
    float16 bits;
    asm("cvt.rn.f16.f32 %0, %1;" : "=h"(bits) : "f"(value));
    return bits;
}

__device__ bfloat16 to_bfloat16(float value)
{
    unsigned bits = __float_as_uint(value);
    return value == value ? (bits + 0x7fff + (bits >> 16 & 1)) >> 16 : 0x7fc0;  // to even
}

__device__ float32 to_float32(float value) { return value; }

// One block a row. An integer times a float16 is exact in float32, so it is rounded to float16 once.
extern "C" __global__ void dequantize(
    const signed char *__restrict__ weight, const float16 *__restrict__ scales, OUTPUT *__restrict__ output,
    int columns)
{
    const long long row = blockIdx.x;
    const float scale = widen(scales[row]);
    weight += row * columns;
    output += row * columns * (8 / BITS);
    #pragma unroll 4
    for (int c = threadIdx.x; c < columns; c += blockDim.x) {
        const int packed = weight[c];
#if BITS == 8
        output[c] = CONVERT(widen(to_float16(packed * scale)));
#else
        output[2 * c] = CONVERT(widen(to_float16((packed >> 4) * scale)));
        output[2 * c + 1] = CONVERT(widen(to_float16(((signed char)(packed << 4) >> 4) * scale)));
#endif
    }
}
"""
TYPE_NAMES = {torch.float16: "float16", torch.bfloat16: "bfloat16", torch.float32: "float32"}
THREADS = 256  # of a block, which has one row


@cache
def _compile(capability: tuple[int, int], bits: int, dtype: torch.dtype) -> KernelFunction:
    name = TYPE_NAMES[dtype]
    options = ["--gpu-architecture=compute_{}{}".format(*capability), f"-DBITS={bits}"]
    options += [f"-DOUTPUT={name}", f"-DCONVERT=to_{name}"]
    program = nvrtc.nvrtcProgram()
    nvrtc.nvrtcCreateProgram(program, SOURCE, "dequantize.cu", 0, [], [])
    nvrtc.nvrtcCompileProgram(program, len(options), options)
    ptx = ctypes.create_string_buffer(nvrtc.nvrtcGetPTXSize(program))
    nvrtc.nvrtcGetPTX(program, ptx)
    nvrtc.nvrtcDestroyProgram(program)
    return KernelFunction(LazyKernelCModule(ptx.raw), "dequantize")


def dequantize_with_nvrtc(weight: torch.Tensor, scale: torch.Tensor, bits: int, dtype: torch.dtype) -> torch.Tensor:
    """
    The weight, equal to `utils.layers.quantization.dequantize` to the bit.

    Args:
        weight: int8 (N, K), or (N, K / 2) for 4 bits, on a GPU.
        scale: (N,) float16.
        bits: 8 or 4.
        dtype: float16, bfloat16 or float32.

    Returns:
        (N, K) in `dtype`.

    Raises:
        RuntimeError: NVRTC or the driver refuses, or is not found.
    """
    N, stored_columns = weight.shape
    output = weight.new_empty(N, stored_columns * 8 // bits, dtype=dtype)
    with torch.cuda.device(weight.device):
        cudart.cudaSetDevice(weight.device.index)  # cpm_kernels has a CUDA runtime of its own
        arguments = [ctypes.c_void_p(tensor.data_ptr()) for tensor in (weight, scale, output)]
        _compile(torch.cuda.get_device_capability(), bits, dtype)(
            (N, 1, 1),
            (THREADS, 1, 1),
            0,
            torch.cuda.current_stream().cuda_stream,
            [*arguments, ctypes.c_int(stored_columns)],
        )
    return output
