// GEMM of few rows for Hopper GPUs: y (M, N) = x (M, K) weight (N, K)^T. See hopper_gemm.py, which compiles and calls it.
//
// Each CTA computes TILE rows of the weight for ROWS rows of x over a share of K. One warp loads tiles of 128 bytes of K
// by TMA into a ring of STAGES stages; the warpgroups multiply them by wgmma, the weight as its first operand, so that
// few rows of x cost little. The weight does not depend on the kernel before, so the ring is filled with it before
// griddepcontrol.wait: memory is busy while that kernel ends (programmatic dependent launch). The CTAs of a cluster have
// a tile of the weight in common, each SPLITS-th of K; they add up their sums through distributed shared memory, in a
// fixed order.
//
// Sources: PTX ISA 8.7, "Asynchronous Warpgroup Level Matrix Instructions", "cp.async.bulk.tensor", "griddepcontrol".
//
// Defined by hopper_gemm.py: ROWS, WARPGROUPS, STAGES, SPLITS, GATED, SCALED, BIASED, FLOAT16, K_BLOCK (elements in 128
// bytes), and the function `multiply`, one wgmma instruction.

typedef unsigned short u16;
typedef unsigned int u32;
typedef unsigned long long u64;
struct alignas(64) TensorMap { u64 opaque[16]; };  // CUtensorMap

constexpr int TILE = 64 * WARPGROUPS, OUTPUTS = GATED ? TILE / 2 : TILE;
constexpr int WEIGHT_BYTES = TILE * 128, STAGE_BYTES = WEIGHT_BYTES + ROWS * 128;
constexpr int PITCH = TILE + 4;  // floats of a row of sums: threads of a warp write to different banks
constexpr int SUM_BYTES = ROWS * PITCH * 4;
constexpr int BARRIERS = STAGES * STAGE_BYTES > SUM_BYTES ? STAGES * STAGE_BYTES : SUM_BYTES;  // behind ring and sums
constexpr int COMPUTING = 128 * WARPGROUPS;  // threads
constexpr u64 EVICT_FIRST = 0x12F0000000000000ull, EVICT_LAST = 0x14F0000000000000ull;

__device__ __forceinline__ u32 shared_address(const void *pointer) { return (u32)__cvta_generic_to_shared(pointer); }

__device__ __forceinline__ void init_barrier(u32 barrier, int arrivals)
{
    asm volatile("mbarrier.init.shared::cta.b64 [%0], %1;" ::"r"(barrier), "r"(arrivals));
}

__device__ __forceinline__ void expect_bytes(u32 barrier, int bytes)
{
    asm volatile("mbarrier.arrive.expect_tx.shared::cta.b64 _, [%0], %1;" ::"r"(barrier), "r"(bytes) : "memory");
}

__device__ __forceinline__ void arrive(u32 barrier)
{
    asm volatile("mbarrier.arrive.shared::cta.b64 _, [%0];" ::"r"(barrier) : "memory");
}

__device__ __forceinline__ void wait(u32 barrier, int parity)
{
    asm volatile(
        "{ .reg .pred done;\n"
        "again: mbarrier.try_wait.parity.shared::cta.b64 done, [%0], %1;\n"
        "@!done bra again; }" ::"r"(barrier), "r"(parity) : "memory");
}

__device__ __forceinline__ void load_tile(u32 target, const TensorMap *map, u32 barrier, int k, int row, u64 policy)
{
    asm volatile(
        "cp.async.bulk.tensor.2d.shared::cluster.global.mbarrier::complete_tx::bytes.L2::cache_hint"
        " [%0], [%1, {%3, %4}], [%2], %5;" ::"r"(target), "l"(map), "r"(barrier), "r"(k), "r"(row), "l"(policy)
        : "memory");
}

// A tile in shared memory for wgmma: rows of 128 bytes of K, swizzled, 1,024 bytes between groups of 8 rows.
__device__ __forceinline__ u64 tile_descriptor(u32 address)
{
    return (u64)((address & 0x3ffff) >> 4) | (u64)1 << 16 | (u64)64 << 32 | (u64)1 << 62;
}

__device__ __forceinline__ float4 load_sums(u32 address, int rank)  // of another CTA of the cluster
{
    u32 remote;
    float4 sums;
    asm volatile("mapa.shared::cluster.u32 %0, %1, %2;" : "=r"(remote) : "r"(address), "r"(rank));
    asm volatile("ld.shared::cluster.v4.f32 {%0, %1, %2, %3}, [%4];"
                 : "=f"(sums.x), "=f"(sums.y), "=f"(sums.z), "=f"(sums.w) : "r"(remote) : "memory");
    return sums;
}

__device__ __forceinline__ void add(float (&total)[4], float4 sums)
{
    total[0] += sums.x, total[1] += sums.y, total[2] += sums.z, total[3] += sums.w;
}

__device__ __forceinline__ float widen(u16 bits)
{
#if FLOAT16
    float value;
    asm("cvt.f32.f16 %0, %1;" : "=f"(value) : "h"(bits));
    return value;
#else
    return __uint_as_float((u32)bits << 16);
#endif
}

__device__ __forceinline__ u32 narrow(float low, float high)
{
    u32 bits;
#if FLOAT16
    asm("cvt.rn.f16x2.f32 %0, %1, %2;" : "=r"(bits) : "f"(high), "f"(low));
#else
    asm("cvt.rn.bf16x2.f32 %0, %1, %2;" : "=r"(bits) : "f"(high), "f"(low));
#endif
    return bits;
}

__device__ __forceinline__ void sync_cluster()
{
    asm volatile("barrier.cluster.arrive.release.aligned;\nbarrier.cluster.wait.acquire.aligned;" ::: "memory");
}

__device__ __forceinline__ void sync_computing_threads()
{
    asm volatile("bar.sync 1, %0;" ::"n"(COMPUTING) : "memory");
}

// The CTA is split of cluster tile * row_tiles + row tile. k_blocks: K / K_BLOCK, rounded up; TMA loads zeros beyond K.
extern "C" __global__ void __launch_bounds__(COMPUTING + 32) hopper_gemm(
    const __grid_constant__ TensorMap weight_map,  // (N, K), or (2 N, K) where GATED; boxes of 64 rows
    const __grid_constant__ TensorMap x_map,       // (M, K), boxes of ROWS rows
    const float *x_scale,                          // (M,)
    const float *weight_scale,                     // (N,), or (2 N,)
    const u16 *bias,                               // (N,)
    u16 *y,                                        // (M, N)
    int M, int N, int k_blocks, int row_tiles)
{
    extern __shared__ unsigned char memory[];
    const u32 ring = (shared_address(memory) + 1023) & ~1023u;
    const u32 filled = ring + BARRIERS, emptied = filled + 8 * STAGES;
    const int warp = threadIdx.x / 32, lane = threadIdx.x % 32;
    const int split = blockIdx.x % SPLITS, tile = blockIdx.x / SPLITS / row_tiles;
    const int first_row = blockIdx.x / SPLITS % row_tiles * ROWS, first_output = tile * OUTPUTS;
    const int first_block = split * k_blocks / SPLITS, blocks = (split + 1) * k_blocks / SPLITS - first_block;

    if (threadIdx.x == 0) {
        for (int stage = 0; stage < STAGES; stage++) {
            init_barrier(filled + 8 * stage, 1);
            init_barrier(emptied + 8 * stage, 4 * WARPGROUPS);
        }
        asm volatile("fence.mbarrier_init.release.cluster;\nfence.proxy.async.shared::cta;" ::: "memory");
    }
    __syncthreads();
    asm volatile("griddepcontrol.launch_dependents;" ::: "memory");

    if (warp == 4 * WARPGROUPS) {
        if (lane == 0) {
            auto load_weight = [&](int block) {
                const u32 barrier = filled + 8 * (block % STAGES), stage = ring + block % STAGES * STAGE_BYTES;
                expect_bytes(barrier, STAGE_BYTES);
                for (int group = 0; group < WARPGROUPS; group++) {  // where GATED, the second half has the up rows
                    const int row = first_output + 64 * group;
                    const bool is_up = GATED && group >= WARPGROUPS / 2;
                    load_tile(stage + 8192 * group, &weight_map, barrier, (first_block + block) * K_BLOCK,
                              is_up ? row - OUTPUTS + N : row, EVICT_FIRST);
                }
            };
            auto load_x = [&](int block) {
                load_tile(ring + block % STAGES * STAGE_BYTES + WEIGHT_BYTES, &x_map, filled + 8 * (block % STAGES),
                          (first_block + block) * K_BLOCK, first_row, EVICT_LAST);
            };
            const int early = blocks < STAGES ? blocks : STAGES;
            for (int block = 0; block < early; block++) load_weight(block);
            asm volatile("griddepcontrol.wait;" ::: "memory");
            for (int block = 0; block < early; block++) load_x(block);
            for (int block = early; block < blocks; block++) {
                wait(emptied + 8 * (block % STAGES), (block / STAGES - 1) & 1);
                load_weight(block);
                load_x(block);
            }
        }
        __syncwarp();
    } else {
        const int group = warp / 4;
        float sums[ROWS / 2] = {};
        for (int block = 0; block < blocks; block++) {
            const u32 stage = ring + block % STAGES * STAGE_BYTES;
            wait(filled + 8 * (block % STAGES), block / STAGES & 1);
            const u64 weight = tile_descriptor(stage + 8192 * group), x = tile_descriptor(stage + WEIGHT_BYTES);
            asm volatile("wgmma.fence.sync.aligned;" ::: "memory");
            #pragma unroll
            for (int step = 0; step < 4; step++) multiply(sums, weight + 2 * step, x + 2 * step);  // 32 bytes of K each
            asm volatile("wgmma.commit_group.sync.aligned;\nwgmma.wait_group.sync.aligned 1;" ::: "memory");
            if (block > 0 && lane == 0) arrive(emptied + 8 * ((block - 1) % STAGES));
        }
        asm volatile("wgmma.wait_group.sync.aligned 0;\ngriddepcontrol.wait;" ::: "memory");
        #pragma unroll
        for (int i = 0; i < ROWS / 2; i++) asm volatile("" : "+f"(sums[i])::"memory");  // not used before the wait
        sync_computing_threads();  // the ring is not read any more: the sums take its place, by row of x
        float *shared_sums = (float *)(memory + (ring - shared_address(memory)));
        const int output = 64 * group + 16 * (warp % 4) + lane / 4;
        #pragma unroll
        for (int i = 0; i < ROWS / 8; i++) {
            float *row = shared_sums + (8 * i + 2 * (lane % 4)) * PITCH + output;
            row[0] = sums[4 * i], row[PITCH] = sums[4 * i + 1];
            row[8] = sums[4 * i + 2], row[PITCH + 8] = sums[4 * i + 3];
        }
        if (SPLITS == 1) sync_computing_threads();
    }
    if (SPLITS > 1) sync_cluster();
    if (warp < 4 * WARPGROUPS) {
        constexpr int LANES = OUTPUTS / 4;  // threads of a row of y
        const int own = 4 * (threadIdx.x % LANES), n = first_output + own;
        const int rows = M - first_row < ROWS ? M - first_row : ROWS;
        for (int m = threadIdx.x / LANES * SPLITS + split; m < rows; m += COMPUTING / LANES * SPLITS) {
            float total[4] = {}, up[4] = {};
            const u32 address = ring + 4 * (m * PITCH + own);
            #pragma unroll
            for (int rank = 0; rank < SPLITS; rank++) {
                add(total, load_sums(address, rank));
                if (GATED) add(up, load_sums(address + 4 * OUTPUTS, rank));
            }
            if (n >= N) continue;
            #pragma unroll
            for (int i = 0; i < 4; i++) {
                if (SCALED) {
                    total[i] *= x_scale[first_row + m] * weight_scale[n + i];
                    if (GATED) up[i] *= x_scale[first_row + m] * weight_scale[N + n + i];
                }
                if (GATED) total[i] = total[i] / (1.f + __expf(-total[i])) * up[i];
                if (BIASED) total[i] += widen(bias[n + i]);
            }
            *(uint2 *)(y + (u64)(first_row + m) * N + n) =
                make_uint2(narrow(total[0], total[1]), narrow(total[2], total[3]));
        }
    }
    if (SPLITS > 1) sync_cluster();  // no CTA may end while another one loads its sums
}
