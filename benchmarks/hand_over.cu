// Hand-overs between warps in the small, right and wrong: what racecheck says of these tells what its word on the
// kernels is worth (device.py). TURNS turns, each the next one's of WARPS warps, which takes what the warp before gave,
// adds to it and gives it on, by the very functions that the kernels use. Two warps and two turns are the PTX manual's
// producer and consumer. GIVER_WAITS: the giver waits too. BY_COPY: what is given comes by cp.async. PLANTED: a race,
// for the barrier is left out.
#include "device.cuh"

struct HandOver {
    const int* from;  // a value for each lane
    int* to;
};

extern "C" __global__ void __launch_bounds__(WARPS * 32) NAME(const HandOver h) {
    CUSRU_SHARED(int, slots, WARPS * 32);
    const int warp = threadIdx.x / 32, lane = threadIdx.x % 32, next = (warp + 1) % WARPS;
    int given, value = 0;
    global_load<4>(&given, h.from + lane);
    for (int turn = warp; turn < TURNS; turn += WARPS) {
        if (turn > 0) {
            if (!PLANTED) barrier_wait(1 + warp, 64);
            copy<4>(&value, slots + warp * 32 + lane);
        }
        value += given;
        if (turn + 1 == TURNS) {
            global_store<4>(h.to + lane, &value);
            return;
        }
        if (BY_COPY) {
            async_load<4>(slots + next * 32 + lane, h.from + lane);
            async_wait();
        } else {
            copy<4>(slots + next * 32 + lane, &value);
        }
        if (!PLANTED) GIVER_WAITS ? barrier_wait(1 + next, 64) : barrier_arrive(1 + next, 64);
    }
}
#define SIMULATED(name) CUSRU_SIMULATED_KERNEL(name, HandOver)  // once more, so that NAME is replaced
SIMULATED(NAME)
