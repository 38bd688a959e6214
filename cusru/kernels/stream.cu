// The yardstick: reads and writes as many bytes as a pass does, in its mix, and computes nothing.
#include "device.cuh"

struct Stream {
    const char* from;
    char* to;
    long long reads, writes;  // vectors of 16 bytes
};

#define AHEAD 8  // loads in flight of each thread

// Each block reads and writes its own stretch of both, so that the two directions are mixed over the whole launch.
extern "C" __global__ void __launch_bounds__(THREADS) stream(const Stream s) {
    long long block = blockIdx.x, blocks = gridDim.x;
    long long first = s.reads * block / blocks, end = s.reads * (block + 1) / blocks;
    __align__(16) unsigned sum[4] = {};
    for (long long i = first + threadIdx.x; i < end; i += AHEAD * THREADS) {
        __align__(16) unsigned v[AHEAD][4];
#pragma unroll
        for (int j = 0; j < AHEAD; ++j)
            if (i + j * THREADS < end) global_load<16>(v[j], s.from + (i + j * THREADS) * 16);
#pragma unroll
        for (int j = 0; j < AHEAD; ++j)
            if (i + j * THREADS < end)
#pragma unroll
                for (int k = 0; k < 4; ++k) sum[k] += v[j][k];
    }
    // What was read goes into what is written, or no load would be left in the program.
    first = s.writes * block / blocks, end = s.writes * (block + 1) / blocks;
    for (long long i = first + threadIdx.x; i < end; i += THREADS) global_store<16>(s.to + i * 16, sum);
}
CUSRU_SIMULATED_KERNEL(stream, Stream)

#ifndef CUSRU_SIMULATOR
// Keeps the device busy, off the memory, while Python prepares the launch that is timed.
extern "C" __global__ void hold(long long cycles) {
    for (long long start = clock64(); clock64() - start < cycles;) {}
}
#endif
