// The entry point: one specialisation, chosen by macros (specialisation.Specialisation lists them).
#include "sru.cuh"

#if CUSRU_PASS == 2
extern "C" __global__ void __launch_bounds__(CUSRU_THREADS, 1) cusru_reduce(const Args args) {
    reduce<CUSRU_TYPE, CUSRU_THREADS / 32>(args);
}
CUSRU_SIMULATED_KERNEL(cusru_reduce, Args, CUSRU_TYPE)
#else
using Chosen =
    Variant<CUSRU_TYPE, CUSRU_SKIP, CUSRU_ACTIVATION, CUSRU_CANDIDATE, CUSRU_WEIGHT, CUSRU_COLUMNS, CUSRU_PACKED>;
#if CUSRU_PASS == 0
extern "C" __global__ void __launch_bounds__(CUSRU_THREADS, 1) cusru_forward(const Args args) {
    forward<Chosen, CUSRU_AHEAD, CUSRU_THREADS>(args);
}
CUSRU_SIMULATED_KERNEL(cusru_forward, Args, CUSRU_TYPE)
#else
extern "C" __global__ void __launch_bounds__(CUSRU_THREADS, 1) cusru_backward(const Args args) {
    backward<Chosen, CUSRU_AHEAD, CUSRU_TILE, CUSRU_THREADS>(args);
}
CUSRU_SIMULATED_KERNEL(cusru_backward, Args, CUSRU_TYPE)
#endif
#endif
