// The baseline: the design of the SRU's first CUDA kernels, in our own text. One thread walks one column and has one
// step in flight: the next step's loads begin when this one is done. Every state is stored, arrays are compact, a gate
// is a true division with its slow path, and a parameter gradient is left per batch, to be summed after. It is
// generous: as NVRTC 13.5 compiles it for sm_90 a step waits for memory once forward and twice backward, a step of the
// sru package's own kernels three times. Equations and names as in cusru/kernels/sru.cuh; with identity and tanh, as
// those kernels had.
#include "numbers.cuh"

using T = TYPE;
using S = typename StateOf<T>::type;

struct Original {  // compact arrays; an absent one is null. Parameters, masks and c0 are in the state's type
    const char *u, *x, *bias, *weight_c, *c0, *mask_c, *mask_pad, *grad_h, *grad_c_last;
    char *h, *c, *c_last;
    char *grad_u, *grad_x, *grad_bias, *grad_weight_c, *grad_c0;  // of bias and weight_c: (2, B, D)
    long long length, batch, width;
    double scale_x;
};

template <typename V> __device__ __forceinline__ S get(const char* array, long long i) {
    Values<V, 1> v;
    v.load(array + i * sizeof(V));
    return v.get(0);
}
template <typename V> __device__ __forceinline__ void put(char* array, long long i, S value) {
    Values<V, 1> v;
    v.set(0, value);
    v.store(array + i * sizeof(V));
}
__device__ __forceinline__ bool padded(const Original& a, long long t, long long b) {
    unsigned char pad = 0;
    if (a.mask_pad) global_load<1>(&pad, a.mask_pad + t * a.batch + b);
    return pad != 0;
}
__device__ __forceinline__ S sigmoid(S x) { return S(1) / (S(1) + exp(-x)); }

struct Place {  // one column, and what stays fixed over its steps
    long long column, columns, b, d;
    bool reversed;
    S bias_f, bias_r, v_f, v_r, m, n;
    __device__ __forceinline__ Place(const Original& a, long long column)
        : column(column), columns(a.batch * a.width), b(column / a.width), d(column % a.width) {
        reversed = BIDIRECTIONAL && d >= a.width / 2;
        bias_f = a.bias ? get<S>(a.bias, d) : S(0);
        bias_r = a.bias ? get<S>(a.bias, a.width + d) : S(0);
        v_f = a.weight_c ? get<S>(a.weight_c, d) : S(0);
        v_r = a.weight_c ? get<S>(a.weight_c, a.width + d) : S(0);
        m = a.mask_c ? get<S>(a.mask_c, column) : S(1);
        n = MASK_GATE ? m : S(1);
    }
    __device__ __forceinline__ S initial(const Original& a) const { return a.c0 ? get<S>(a.c0, column) : S(0); }
};

extern "C" __global__ void original_forward(const Original a) {
    Place p(a, static_cast<long long>(blockIdx.x) * blockDim.x + threadIdx.x);
    if (p.column >= p.columns) return;
    S c = p.initial(a);
#pragma unroll 1
    for (long long step = 0; step < a.length; ++step) {
        long long t = p.reversed ? a.length - 1 - step : step, at = t * p.columns + p.column;
        S h = 0;
        if (!padded(a, t, p.b)) {
            S z = get<T>(a.u, at * K), u1 = get<T>(a.u, at * K + 1), u2 = get<T>(a.u, at * K + 2);
            S s = K == 4 ? get<T>(a.u, at * K + K - 1) : a.x ? S(a.scale_x) * get<T>(a.x, at) : S(0);
            S f = sigmoid(u1 + p.bias_f + c * p.v_f), r = sigmoid(u2 + p.bias_r + c * p.v_r);
            c = z + (c - z) * f;
            h = r * p.m * (TANH_ACTIVATION ? tanh(c) : c) + (S(1) - p.n * r) * s;
        }
        put<S>(a.c, at, c);
        put<T>(a.h, at, h);
    }
    put<S>(a.c_last, p.column, c);
}

extern "C" __global__ void original_backward(const Original a) {
    Place p(a, static_cast<long long>(blockIdx.x) * blockDim.x + threadIdx.x);
    if (p.column >= p.columns) return;
    S carry = a.grad_c_last ? get<S>(a.grad_c_last, p.column) : S(0);
    S sum_f = 0, sum_r = 0, sum_vf = 0, sum_vr = 0;
#pragma unroll 1
    for (long long step = a.length - 1; step >= 0; --step) {
        long long t = p.reversed ? a.length - 1 - step : step, at = t * p.columns + p.column;
        S gu0 = 0, gu1 = 0, gu2 = 0, gs = 0;
        if (!padded(a, t, p.b)) {
            S c = get<S>(a.c, at);
            S before = step ? get<S>(a.c, p.reversed ? at + p.columns : at - p.columns) : p.initial(a);
            S z = get<T>(a.u, at * K), u1 = get<T>(a.u, at * K + 1), u2 = get<T>(a.u, at * K + 2);
            S s = K == 4 ? get<T>(a.u, at * K + K - 1) : a.x ? S(a.scale_x) * get<T>(a.x, at) : S(0);
            S gh = get<T>(a.grad_h, at);
            S f = sigmoid(u1 + p.bias_f + before * p.v_f), r = sigmoid(u2 + p.bias_r + before * p.v_r);
            S value = TANH_ACTIVATION ? tanh(c) : c, slope = TANH_ACTIVATION ? S(1) - value * value : S(1);
            S gc = gh * p.m * r * slope + carry;
            gs = gh * (S(1) - p.n * r);
            gu2 = gh * (p.m * value - p.n * s) * r * (S(1) - r);
            gu1 = gc * (before - z) * f * (S(1) - f);
            gu0 = gc * (S(1) - f);
            carry = gc * f + gu1 * p.v_f + gu2 * p.v_r;
            sum_f += gu1, sum_r += gu2, sum_vf += gu1 * before, sum_vr += gu2 * before;
        }
        put<T>(a.grad_u, at * K, gu0);
        put<T>(a.grad_u, at * K + 1, gu1);
        put<T>(a.grad_u, at * K + 2, gu2);
        if (K == 4) put<T>(a.grad_u, at * K + K - 1, gs);
        if (a.grad_x) put<T>(a.grad_x, at, S(a.scale_x) * gs);
    }
    if (a.grad_bias) put<S>(a.grad_bias, p.column, sum_f), put<S>(a.grad_bias, p.columns + p.column, sum_r);
    if (a.grad_weight_c)
        put<S>(a.grad_weight_c, p.column, sum_vf), put<S>(a.grad_weight_c, p.columns + p.column, sum_vr);
    if (a.grad_c0) put<S>(a.grad_c0, p.column, carry);
}

CUSRU_SIMULATED_KERNEL(original_forward, Original)
CUSRU_SIMULATED_KERNEL(original_backward, Original)
