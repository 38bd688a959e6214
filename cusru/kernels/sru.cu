// The entry point: one specialisation, chosen by macros (specialisation.Specialisation lists them).
#include "guess.cuh"

#if CUSRU_PASS == 3
extern "C" __global__ void __launch_bounds__(CUSRU_THREADS) cusru_clear(const Args args) { clear(args); }
CUSRU_SIMULATED_KERNEL(cusru_clear, Args, CUSRU_TYPE)
#elif CUSRU_PASS == 2
extern "C" __global__ void __launch_bounds__(CUSRU_THREADS, 1) cusru_reduce(const Args args) {
    reduce<CUSRU_TYPE, CUSRU_THREADS, CUSRU_COLUMNS>(args);
}
CUSRU_SIMULATED_KERNEL(cusru_reduce, Args, CUSRU_TYPE)
#else
using Chosen = Variant<CUSRU_TYPE, CUSRU_CELL, CUSRU_SKIP, CUSRU_ACTIVATION, CUSRU_CANDIDATE, CUSRU_WEIGHT,
                       CUSRU_ZONEOUT, CUSRU_COLUMNS, CUSRU_PACKED, CUSRU_MARKS>;
#if CUSRU_PASS == 0
extern "C" __global__ void __launch_bounds__(CUSRU_THREADS, CUSRU_RESIDENT) cusru_forward(const Args args) {
    CUSRU_DYNAMIC_SHARED(shared);
    static_assert(Inputs<Chosen, false>::BYTES == CUSRU_STEP_BYTES, "see specialisation.py");
#if CUSRU_SPLIT && CUSRU_AFFINE
    SplitForward<Chosen, CUSRU_TILE>(args, shared).run();
#elif CUSRU_SPLIT
    GuessForward<Chosen, CUSRU_TILE, CUSRU_MEND>(args, shared).run();
#else
    Forward<Chosen, CUSRU_TILE, CUSRU_THREADS == 32>(args, shared).run();
#endif
}
CUSRU_SIMULATED_KERNEL(cusru_forward, Args, CUSRU_TYPE)
#else
extern "C" __global__ void __launch_bounds__(CUSRU_THREADS, CUSRU_RESIDENT) cusru_backward(const Args args) {
    CUSRU_DYNAMIC_SHARED(shared);
    static_assert(Inputs<Chosen, true, CUSRU_RECOMPUTE>::BYTES == CUSRU_STEP_BYTES, "see specialisation.py");
#if CUSRU_SPLIT
    static_assert(Waiting<Chosen, CUSRU_TILE>::VALUES == CUSRU_WAITING, "see specialisation.py");
    SplitBackward<Chosen, CUSRU_TILE, CUSRU_UNIT, CUSRU_RECOMPUTE>(args, shared).run();
#else
    Backward<Chosen, CUSRU_TILE, CUSRU_UNIT, CUSRU_THREADS / 32, CUSRU_RECOMPUTE, CUSRU_THREADS == 32> backward(args,
                                                                                                                shared);
    backward.run();
    backward.leave_sums();
#endif
}
CUSRU_SIMULATED_KERNEL(cusru_backward, Args, CUSRU_TYPE)
#endif
#endif
