"""The equations of forward and backward, and the bounds of their errors, as naive float64 loops over time: obviously right,
slow, and sharing no code with cusru.

The inputs are exact: the already rounded values, widened to float64 (`widen`). `forward` and `backward` return a dict of
results with, under "magnitude" and "amplification", what `check` needs to bound the error of each:

    bound = max(tolerance, 8 * eps * K) * magnitude + floor

magnitude: the largest over time in the column, a difference counting with the magnitudes of both its terms.
The rounding of c = f*c' + g*z and of the carry, which are such differences, is also felt in what is computed from them: so
activation(c) counts with both terms of c, times its slope, and gc with the largest carry before it, as far as it was kept.
K: the amplification K_t = |dc_t/dc_{t-1}| * K_{t-1} + 1, its maximum over time, in columns whose recurrence amplifies
(|dc_t/dc_{t-1}| > 1 somewhere) and in those whose u never changes, which rounds the same way at every step; 0 elsewhere, so
that the tolerance alone holds there: K counts steps too, and would excuse anything of a long memory.
"""

import numpy as np

TOLERANCE = {"float64": 1e-12, "float32": 2e-5, "float16": 1e-3, "bfloat16": 5e-3}
LARGEST = {"float64": np.finfo(np.float64).max, "float32": np.finfo(np.float32).max, "float16": 65504.0, "bfloat16": 3.38e38}
FLOOR = {"float64": 1e-305, "float32": 1e-36, "float16": 2.0**-23, "bfloat16": 1e-36}  # flushed, rounded
# A factor below 2^-126 may be flushed before factors of up to some 30 multiply it: 1e-36 for float32's state.
STATE_RESULTS = ("c", "c_last")  # held in the state's dtype always
SCALE, ALPHA = 1.0507009873554804934, 1.6732632423543772848


def widen(a):
    """Any array, or bfloat16 bits in uint16, as float64; None stays None."""
    if a is None:
        return None
    a = np.asarray(a)
    if a.dtype == np.uint16:
        return (a.astype(np.uint32) << 16).view(np.float32).astype(np.float64)
    return a.astype(np.float64)


def sigmoid(a):
    return 1 / (1 + np.exp(-a))


def function(name, c):
    if name == "identity":
        return c
    if name == "tanh":
        return np.tanh(c)
    if name == "relu":
        return np.where(c <= 0, 0, c)
    if name == "selu":
        return np.where(c > 0, SCALE * c, SCALE * ALPHA * np.expm1(np.where(c > 0, 0, c)))
    raise ValueError(name)


def derivative(name, c):
    nan = np.where(np.isnan(c), np.nan, 0)
    if name == "identity":
        return np.ones_like(c)
    if name == "tanh":
        return 1 / np.cosh(c) ** 2
    if name == "relu":
        return np.where(c > 0, 1.0, 0.0) + nan
    if name == "selu":
        return np.where(c > 0, SCALE, SCALE * ALPHA * np.exp(np.where(c > 0, 0, c)))
    raise ValueError(name)


def activated_size(name, c, terms):
    """The size of activation(c) where c is a sum of these sizes: its error, if its terms cancel, comes through the slope."""
    steepest = {"relu": 1.0, "selu": SCALE * ALPHA}.get(name)
    at_kink = steepest is not None and abs(c) <= 1e-4 * terms  # rounding may take c across it
    return np.maximum(abs(function(name, c)), np.where(at_kink, steepest or 0, abs(derivative(name, c))) * terms)


class _Columns:
    """Which way columns run, where they are padded, and where they begin anew."""

    def __init__(self, length, batch, dim, mask_pad, starts, bidirectional, reverse):
        self.pad = np.zeros((length, batch), bool) if mask_pad is None else np.asarray(mask_pad) != 0
        self.starts = np.zeros((length, batch), bool) if starts is None else np.asarray(starts) != 0
        self.halves = [(slice(0, dim), bool(reverse))]
        if bidirectional:
            self.halves = [(slice(0, dim // 2), bool(reverse)), (slice(dim // 2, dim), not reverse)]

    def begins(self, t, backward):
        """(B, 1): whether the state before step t is 0 whatever came before."""
        length = len(self.starts)
        at = self.starts[t] if not backward else self.starts[t + 1] if t + 1 < length else np.zeros_like(self.starts[0])
        return at[:, None]


class _Inputs(_Columns):
    def __init__(self, u, x, bias, weight_c, c0, mask_c, mask_pad, scale_x, bidirectional, starts=None, reverse=False):
        super().__init__(*np.shape(u)[:3], mask_pad, starts, bidirectional, reverse)
        self.u = widen(u)
        length, batch, dim, k = self.shape = self.u.shape
        zeros = np.zeros((length, batch, dim))
        self.steady = (self.u == self.u[:1]).all(axis=(0, 3)) if length > 1 else np.zeros((batch, dim), bool)
        self.bias = np.zeros((2, dim)) if bias is None else widen(bias).reshape(2, dim)
        self.per_step = weight_c is not None and np.ndim(weight_c) == 4
        self.linear = weight_c is None  # then nothing is multiplied by v: 0 * NaN would be NaN
        weight = np.zeros((2, dim)) if weight_c is None else widen(weight_c)
        self.v = weight if self.per_step else np.broadcast_to(np.moveaxis(weight.reshape(2, dim), 0, 1), (length, batch, dim, 2))
        self.c0 = np.zeros((batch, dim)) if c0 is None else widen(c0)
        self.m = np.ones((batch, dim)) if mask_c is None else widen(mask_c)
        self.s = self.u[..., 3] if k == 4 else zeros if x is None else float(scale_x) * widen(x)

    def times_v(self, t, d, row, a):
        return np.zeros_like(a) if self.linear else a * self.v[t, :, d, row]

    def step(self, t, d, c_prev, candidate):
        """f, 1 - f, r, 1 - r, z, dc/dc_prev."""
        arg_f = self.u[t, :, d, 1] + self.bias[0, d] + self.times_v(t, d, 0, c_prev)
        arg_r = self.u[t, :, d, 2] + self.bias[1, d] + self.times_v(t, d, 1, c_prev)
        f, g, z = sigmoid(arg_f), sigmoid(-arg_f), function(candidate, self.u[t, :, d, 0])
        return f, g, sigmoid(arg_r), sigmoid(-arg_r), z, f + self.times_v(t, d, 0, (c_prev - z) * f * g)


def _largest(a):
    """Over time, what is not finite left out; keeps the axis."""
    a = np.where(np.isfinite(a), np.abs(a), 0)
    return a.max(axis=0, keepdims=True, initial=0)


def _amplification(jacobians, steady):
    """K per column, (1, B, D), from dc/dc_prev in the order of the recursion; 0 where nothing is amplified."""
    k, worst = np.ones(jacobians.shape[1:]), np.ones(jacobians.shape[1:])
    for j in np.abs(np.where(np.isfinite(jacobians), jacobians, 0)):
        k = j * k + 1
        worst = np.maximum(worst, k)
    return np.where((_largest(jacobians) > 1) | steady, worst[None], 0)


def forward(
    u,
    x=None,
    bias=None,
    weight_c=None,
    c0=None,
    mask_c=None,
    mask_pad=None,
    *,
    activation="identity",
    candidate="identity",
    scale_x=1.0,
    mask_target="state",
    bidirectional=False,
    save_every=1,
    starts=None,
    reverse=False,
):
    i = _Inputs(u, x, bias, weight_c, c0, mask_c, mask_pad, scale_x, bidirectional, starts, reverse)
    length, batch, dim, _ = i.shape
    h, h_size, all_c, jac = (np.zeros((length, batch, dim)) for _ in range(4))
    c_last = i.c0.copy()
    amplification = np.zeros((1, batch, dim))
    count = 0 if save_every is None else -(-length // save_every)
    saved = np.zeros((count, batch, dim))
    with np.errstate(all="ignore"):
        for d, backward in i.halves:
            c, times = i.c0[:, d], range(length)[:: -1 if backward else 1]
            m = i.m[:, d]
            for t in times:
                begins = i.begins(t, backward)
                c = np.where(begins, 0, c)
                f, g, r, q, z, jac[t, :, d] = i.step(t, d, c, candidate)
                new = f * c + g * z
                a, s = function(activation, new), i.s[t, :, d]
                a_size = activated_size(activation, new, abs(f * c) + abs(g * z))
                if mask_target == "state":
                    h_new, size = r * m * a + q * s, abs(r * m) * a_size + abs(q * s)
                else:
                    h_new, size = m * r * a + (1 - m * r) * s, abs(r * m) * a_size + (q + abs(1 - m) * r) * abs(s)
                    h_new = np.where(m == 1, r * a + q * s, h_new)
                pad = i.pad[t][:, None]
                c = np.where(pad, c, new)
                jac[t, :, d] = np.where(begins, 0, np.where(pad, 1, jac[t, :, d]))
                h[t, :, d], h_size[t, :, d], all_c[t, :, d] = np.where(pad, 0, h_new), np.where(pad, 0, size), c
            c_last[:, d] = c
            amplification[:, :, d] = _amplification(jac[:, :, d][:: -1 if backward else 1], i.steady[:, d])
            for j in range(count):
                t = j * save_every if backward else min((j + 1) * save_every, length) - 1
                saved[j, :, d] = all_c[t, :, d]
    c_size = np.maximum(_largest(all_c), _largest(i.c0[None]))
    return {
        "h": h, "c": None if save_every is None else saved, "c_last": c_last, "all_c": all_c,
        "magnitude": {"h": _largest(h_size), "c": c_size, "c_last": c_size[0]},
        "amplification": {"h": amplification, "c": amplification, "c_last": amplification[0]},
    }  # fmt: skip


def backward(
    grad_h,
    grad_c_last,
    u,
    x=None,
    bias=None,
    weight_c=None,
    c0=None,
    mask_c=None,
    mask_pad=None,
    *,
    activation="identity",
    candidate="identity",
    scale_x=1.0,
    mask_target="state",
    bidirectional=False,
    save_every=1,
    starts=None,
    reverse=False,
    states=None,
):
    """states: every c (L, B, D), as the backward under test is given it or recomputes it. Without them the oracle takes its
    own, and where the recurrence amplifies K is the product of both directions', for the forward's error in c enters too."""
    forward_k = 1.0
    if states is None:
        own = forward(u, x, bias, weight_c, c0, mask_c, mask_pad, activation=activation, candidate=candidate, scale_x=scale_x,
                      mask_target=mask_target, bidirectional=bidirectional, starts=starts, reverse=reverse)  # fmt: skip
        states, forward_k = own["all_c"], np.maximum(own["amplification"]["h"], 1)
    states = widen(states)
    i = _Inputs(u, x, bias, weight_c, c0, mask_c, mask_pad, scale_x, bidirectional, starts, reverse)
    length, batch, dim, k = i.shape
    gh_all = widen(grad_h)
    gu, gu_size = np.zeros((2, length, batch, dim, 4))
    gw, gw_size = np.zeros((2, length, batch, dim, 2))
    carry_last, jac = np.zeros((batch, dim)), np.zeros((length, batch, dim))
    carry_size, amplification = np.zeros((1, batch, dim)), np.zeros((1, batch, dim))
    with np.errstate(all="ignore"):
        for d, backward in i.halves:
            carry = np.zeros_like(i.c0[:, d]) if grad_c_last is None else widen(grad_c_last)[:, d]
            carry_sizes = [abs(carry)]
            carried = abs(carry)  # the largest carry so far, shrunk as an error made then has since
            m, times = i.m[:, d], range(length)[:: 1 if backward else -1]
            for t in times:
                before, begins = t + 1 if backward else t - 1, i.begins(t, backward)
                c_prev = np.where(begins, 0, states[before][:, d] if 0 <= before < length else i.c0[:, d])
                f, g, r, q, z, jac[t, :, d] = i.step(t, d, c_prev, candidate)
                c, s, gh = states[t][:, d], i.s[t, :, d], gh_all[t][:, d]
                a = function(activation, c)
                a_size = activated_size(activation, c, abs(f * c_prev) + abs(g * z))
                if mask_target == "state":
                    gr, gr_size = gh * (m * a - s), abs(gh) * (abs(m) * a_size + abs(s))
                    gs, gs_size = gh * q, abs(gh * q)
                else:
                    gr, gr_size = gh * m * (a - s), abs(gh * m) * (a_size + abs(s))
                    gs, gs_size = gh * np.where(m == 1, q, 1 - m * r), abs(gh) * (q + abs(1 - m) * r)
                through_h = gh * m * r * derivative(activation, c)
                gc, gc_size = through_h + carry, abs(through_h) + abs(carry)
                felt = np.maximum(gc_size, carried)  # gc's size, as far as its error goes
                dz = derivative(candidate, i.u[t, :, d, 0])
                gu2, gu2_size = gr * r * q, gr_size * r * q
                gu1, gu1_size = gc * (c_prev - z) * f * g, felt * (abs(c_prev) + abs(z)) * f * g
                gu0, gu0_size = gc * g * dz, felt * g * abs(dz)
                new = gc * f + i.times_v(t, d, 0, gu1) + i.times_v(t, d, 1, gu2)
                through_f = gc_size * (abs(c_prev) + abs(z)) * f * g
                new_size = gc_size * f + abs(i.times_v(t, d, 0, through_f)) + abs(i.times_v(t, d, 1, gu2_size))
                pad = i.pad[t][:, None]
                carry = np.where(begins, 0, np.where(pad, carry, new))
                carried = np.where(begins, 0, np.where(pad, carried, np.maximum(new_size, carried * abs(jac[t, :, d]))))
                carry_sizes.append(np.where(pad, 0, new_size))
                jac[t, :, d] = np.where(begins, 0, np.where(pad, 1, jac[t, :, d]))
                gu[t, :, d] = np.where(pad[..., None], 0, np.stack([gu0, gu1, gu2, gs], -1))
                gu_size[t, :, d] = np.where(pad[..., None], 0, np.stack([gu0_size, gu1_size, gu2_size, gs_size], -1))
                gw[t, :, d] = np.where(pad[..., None], 0, np.stack([gu1 * c_prev, gu2 * c_prev], -1))
                gw_size[t, :, d] = np.where(pad[..., None], 0, np.stack([gu1_size, gu2_size], -1) * abs(c_prev)[..., None])
            carry_last[:, d] = carry
            carry_size[:, :, d] = _largest(np.array(carry_sizes))
            amplification[:, :, d] = _amplification(jac[:, :, d][:: 1 if backward else -1], i.steady[:, d])

    amplification = amplification * forward_k

    def parameter(a):  # (L, B, D, 2) -> (2, D)
        with np.errstate(all="ignore"):
            return np.moveaxis(a.sum(axis=(0, 1)), -1, 0)

    results, sizes, ks = {}, {}, {}
    per_d = amplification.max(axis=(0, 1), initial=0)
    results["u"], sizes["u"], ks["u"] = gu[..., :k], _largest(gu_size[..., :k]), amplification[..., None]
    results["c0"], sizes["c0"], ks["c0"] = carry_last, carry_size[0], amplification[0]
    results["x"], sizes["x"], ks["x"] = scale_x * gu[..., 3], _largest(scale_x * gu_size[..., 3]), amplification
    results["bias"], sizes["bias"], ks["bias"] = parameter(gu[..., 1:3]), parameter(gu_size[..., 1:3]), per_d
    if i.per_step:
        results["weight_c"], sizes["weight_c"], ks["weight_c"] = gw, _largest(gw_size), amplification[..., None]
    else:
        results["weight_c"], sizes["weight_c"], ks["weight_c"] = parameter(gw), parameter(gw_size), per_d
    for name, given in {"x": x, "bias": bias, "weight_c": weight_c, "c0": c0}.items():
        if given is None:
            results[name] = None
    return results | {"magnitude": sizes, "amplification": ks}


# ---- what is affine in c: the QRNN's pooling, the linear recurrence ----------------------------------------------------------


class _Affine(_Columns):
    """c = e * c_prev + i * z, step by step, and the sizes of these."""

    def __init__(self, shape, c0, mask_pad, starts, bidirectional, reverse):
        self.shape = shape
        super().__init__(*shape, mask_pad, starts, bidirectional, reverse)
        self.c0 = np.zeros(shape[1:]) if c0 is None else widen(c0)

    def forward(self, save_every):
        length, batch, dim = self.shape
        h, h_size, all_c, jac = (np.zeros(self.shape) for _ in range(4))
        c_last, amplification = self.c0.copy(), np.zeros((1, batch, dim))
        with np.errstate(all="ignore"):
            for d, backward in self.halves:
                c = self.c0[:, d]
                for t in range(length)[:: -1 if backward else 1]:
                    begins, pad = self.begins(t, backward), self.pad[t][:, None]
                    c = np.where(begins, 0, c)
                    e, summand, o = self.e(t, d), self.summand(t, d), self.o(t, d)
                    new, size = e * c + summand, self.kept(t, d, c) + abs(summand)
                    h[t, :, d], h_size[t, :, d] = np.where(pad, 0, o * new), np.where(pad, 0, abs(o) * size)
                    c = all_c[t, :, d] = np.where(pad, c, new)
                    jac[t, :, d] = np.where(begins, 0, np.where(pad, 1, e))
                c_last[:, d] = c
                amplification[:, :, d] = _amplification(jac[:, :, d][:: -1 if backward else 1], self.steady[:, d])
        count = 0 if save_every is None else -(-length // save_every)
        saved = np.zeros((count, batch, dim))
        for d, backward in self.halves:
            for j in range(count):
                saved[j, :, d] = all_c[j * save_every if backward else min((j + 1) * save_every, length) - 1][:, d]
        c_size = np.maximum(_largest(all_c), _largest(self.c0[None]))
        return {
            "h": h, "c": None if save_every is None else saved, "c_last": c_last, "all_c": all_c,
            "magnitude": {"h": _largest(h_size), "c": c_size, "c_last": c_size[0]},
            "amplification": {"h": amplification, "c": amplification, "c_last": amplification[0]},
        }  # fmt: skip

    def backward(self, grad_h, grad_c_last, states, terms):
        """terms(t, d, gh, gc, felt, c_prev): the gradients of a step's inputs and their sizes, each (name, value, size)."""
        forward_k = 1.0
        if states is None:
            own = self.forward(None)
            states, forward_k = own["all_c"], np.maximum(own["amplification"]["h"], 1)
        states, grad_h = widen(states), widen(grad_h)
        length, batch, dim = self.shape
        found, sizes, jac = {}, {}, np.zeros(self.shape)
        carry_last, carry_size, amplification = np.zeros((batch, dim)), np.zeros((1, batch, dim)), np.zeros((1, batch, dim))
        with np.errstate(all="ignore"):
            for d, backward in self.halves:
                carry = np.zeros_like(self.c0[:, d]) if grad_c_last is None else widen(grad_c_last)[:, d]
                carry_sizes, carried = [abs(carry)], abs(carry)
                for t in range(length)[:: 1 if backward else -1]:
                    begins, pad = self.begins(t, backward), self.pad[t][:, None]
                    before = t + 1 if backward else t - 1
                    c_prev = np.where(begins, 0, states[before][:, d] if 0 <= before < length else self.c0[:, d])
                    gh, e, o = grad_h[t][:, d], self.e(t, d), self.o(t, d)
                    gc, gc_size = gh * o + carry, abs(gh * o) + abs(carry)
                    for name, value, size in terms(t, d, gh, gc, np.maximum(gc_size, carried), c_prev):
                        for all_steps, one in ((found, value), (sizes, size)):
                            all_steps.setdefault(name, np.zeros(self.shape))[t, :, d] = np.where(pad, 0, one)
                    new_size = self.kept(t, d, gc_size)
                    carry = np.where(begins, 0, np.where(pad, carry, gc * e))
                    carried = np.where(begins, 0, np.where(pad, carried, np.maximum(new_size, carried * abs(e))))
                    carry_sizes.append(np.where(pad, 0, new_size))
                    jac[t, :, d] = np.where(begins, 0, np.where(pad, 1, e))
                carry_last[:, d] = carry
                carry_size[:, :, d] = _largest(np.array(carry_sizes))
                amplification[:, :, d] = _amplification(jac[:, :, d][:: 1 if backward else -1], self.steady[:, d])
        return found, sizes, amplification * forward_k, {"c0": carry_last}, {"c0": carry_size[0]}


class _Pooling(_Affine):
    def __init__(self, u, pooling, gate, c0, zoneout, mask_pad, bidirectional, starts, reverse):
        super().__init__(np.shape(u)[:3], c0, mask_pad, starts, bidirectional, reverse)
        self.u, self.pooling, self.sign = widen(u), pooling, 1 if gate == "forget" else -1
        length, batch, dim = self.shape
        self.steady = (self.u == self.u[:1]).all(axis=(0, 3)) if length > 1 else np.zeros((batch, dim), bool)
        self.zoned = np.asarray(zoneout) != 0 if np.ndim(zoneout) == 3 else None
        self.p = 0.0 if zoneout is None or self.zoned is not None else float(zoneout)

    def taken(self, t, d):
        return 1 - self.p if self.zoned is None else np.where(self.zoned[t, :, d], 0.0, 1.0)

    def e(self, t, d):
        f = sigmoid(self.sign * self.u[t, :, d, 1])
        return np.where(self.zoned[t, :, d], 1.0, f) if self.zoned is not None else self.p + (1 - self.p) * f

    def i(self, t, d):
        if self.pooling == "ifo":
            i = self.taken(t, d) * sigmoid(self.u[t, :, d, 3])
        else:
            i = self.taken(t, d) * sigmoid(-self.sign * self.u[t, :, d, 1])
        return i if self.zoned is None else np.where(self.zoned[t, :, d], 0.0, i)

    def o(self, t, d):
        return sigmoid(self.u[t, :, d, 2]) if self.pooling != "f" else np.ones_like(self.u[t, :, d, 0])

    def summand(self, t, d):
        return self.i(t, d) * np.tanh(self.u[t, :, d, 0])

    def kept(self, t, d, c):
        return abs(self.e(t, d) * c)

    def terms(self, t, d, gh, gc, felt, c_prev):
        u = self.u[t, :, d]
        z, i, o, dz = np.tanh(u[..., 0]), self.i(t, d), self.o(t, d), 1 / np.cosh(u[..., 0]) ** 2
        de = sigmoid(u[..., 1]) * sigmoid(-u[..., 1]) * (1 - self.p)
        if self.zoned is not None:
            de = np.where(self.zoned[t, :, d], 0, de)
        yield "u0", gc * i * dz, felt * i * dz
        if self.pooling == "ifo":
            yield "u1", self.sign * gc * c_prev * de, felt * abs(c_prev) * de
            yield "u3", gc * z * i * sigmoid(-u[..., 3]), felt * abs(z) * i * sigmoid(-u[..., 3])
        else:
            yield "u1", self.sign * gc * (c_prev - z) * de, felt * (abs(c_prev) + abs(z)) * de
        if self.pooling != "f":
            c, do = self.e(t, d) * c_prev + i * z, o * sigmoid(-u[..., 2])
            yield "u2", gh * c * do, abs(gh) * (self.kept(t, d, c_prev) + abs(i * z)) * do


def qrnn_forward(
    u, *, pooling="fo", gate="forget", c0=None, zoneout=None, mask_pad=None, bidirectional=False, save_every=1, starts=None,
    reverse=False,
):  # fmt: skip
    return _Pooling(u, pooling, gate, c0, zoneout, mask_pad, bidirectional, starts, reverse).forward(save_every)


def qrnn_backward(
    grad_h, grad_c_last, u, *, pooling="fo", gate="forget", c0=None, zoneout=None, mask_pad=None, bidirectional=False,
    save_every=1, starts=None, reverse=False, states=None,
):  # fmt: skip
    cell = _Pooling(u, pooling, gate, c0, zoneout, mask_pad, bidirectional, starts, reverse)
    found, sizes, k, results, magnitudes = cell.backward(grad_h, grad_c_last, states, cell.terms)
    names = [f"u{j}" for j in range(np.shape(u)[3])]
    results["u"] = np.stack([found.get(n, np.zeros(cell.shape)) for n in names], -1)
    magnitudes["u"] = _largest(np.stack([sizes.get(n, np.zeros(cell.shape)) for n in names], -1))
    if c0 is None:
        results["c0"] = None
    return results | {"magnitude": magnitudes, "amplification": {"u": k[..., None], "c0": k[0]}}


class _Linear(_Affine):
    def __init__(self, a, b, form, c0, mask_pad, bidirectional, starts, reverse):
        super().__init__(np.shape(b), c0, mask_pad, starts, bidirectional, reverse)
        self.a, self.b, self.form = np.broadcast_to(widen(a), self.shape), widen(b), form
        same = [(x == x[:1]).all(axis=0) if len(x) > 1 else np.zeros(x.shape[1:], bool) for x in (self.a, self.b)]
        self.steady = same[0] & same[1]

    def e(self, t, d):
        return self.a[t, :, d] if self.form == "affine" else 1 - self.a[t, :, d]

    def o(self, t, d):
        return np.ones_like(self.b[t, :, d])

    def summand(self, t, d):
        return self.a[t, :, d] * self.b[t, :, d] if self.form == "blend" else self.b[t, :, d]

    def kept(self, t, d, c):
        """c - a c is a difference."""
        product = abs(self.a[t, :, d] * c)
        return product if self.form == "affine" else abs(c) + product

    def terms(self, t, d, gh, gc, felt, c_prev):
        a, b = self.a[t, :, d], self.b[t, :, d]
        if self.form == "blend":
            yield "a", gc * (b - c_prev), felt * (abs(b) + abs(c_prev))
            yield "b", gc * a, felt * abs(a)
        else:
            yield "a", gc * (c_prev if self.form == "affine" else -c_prev), felt * abs(c_prev)
            yield "b", gc, felt


def linear_recurrence_forward(
    a, b, *, form="affine", c0=None, mask_pad=None, bidirectional=False, save_every=1, starts=None, reverse=False
):
    return _Linear(a, b, form, c0, mask_pad, bidirectional, starts, reverse).forward(save_every)


def linear_recurrence_backward(
    grad_h, grad_c_last, a, b, *, form="affine", c0=None, mask_pad=None, bidirectional=False, save_every=1, starts=None,
    reverse=False, states=None,
):  # fmt: skip
    cell = _Linear(a, b, form, c0, mask_pad, bidirectional, starts, reverse)
    found, sizes, k, results, magnitudes = cell.backward(grad_h, grad_c_last, states, cell.terms)
    of_step, size = (steps.get("a", np.zeros(cell.shape)) for steps in (found, sizes))
    ks = {"b": k, "c0": k[0], "a": k}
    results["b"], magnitudes["b"] = found.get("b", np.zeros(cell.shape)), _largest(sizes.get("b", np.zeros(cell.shape)))
    results["a"], magnitudes["a"] = of_step, _largest(size)
    if np.ndim(a) < 3:
        over = tuple(range(3 - np.ndim(a)))
        results["a"], magnitudes["a"], ks["a"] = of_step.sum(over), size.sum(over), k.max(axis=over, initial=0)
    if c0 is None:
        results["c0"] = None
    return results | {"magnitude": magnitudes, "amplification": ks}


def check(actual, expected, dtype_name, state_results=STATE_RESULTS, scale=1.0):
    """Every result of `actual` (a dict or a NamedTuple of arrays; None: skipped) against `expected`; returns the worst
    error / bound.

    state_results names those that are held in the state's dtype; the others are held in u's, `dtype_name`. scale tightens the
    bound.
    """
    actual = actual if isinstance(actual, dict) else actual._asdict()
    state = "float64" if dtype_name == "float64" else "float32"
    eps = 2.0**-53 if state == "float64" else 2.0**-24
    worst = 0.0
    for name, given in actual.items():
        if given is None:
            continue
        dtype = state if name in state_results else dtype_name
        want = expected[name]
        got = widen(given).reshape(np.shape(want))
        if got.size == 0:
            continue
        with np.errstate(all="ignore"):
            k = np.where(np.isnan(expected["amplification"][name]), np.inf, expected["amplification"][name])
            bound = np.maximum(TOLERANCE[dtype], 8 * eps * k) * expected["magnitude"][name] * scale + FLOOR[dtype]
            bound = np.broadcast_to(bound, want.shape)
            ratio = abs(got - want) / bound
            overflowed = abs(want) + bound > LARGEST[dtype]
            wrong_kind = np.isfinite(got) != np.isfinite(want)
            ratio = np.where(wrong_kind, np.inf, np.where(np.isfinite(want), ratio, 0))
            ratio = np.where(overflowed & np.isfinite(want) & ~np.isfinite(got), 0, ratio)
        worst = max(worst, float(ratio.max()))
        if not ratio.max() <= 1:
            at = tuple(map(int, np.unravel_index(np.argmax(ratio), ratio.shape)))
            raise AssertionError(f"{name}{list(at)}: {got[at]!r}, expected {want[at]!r}; error / bound = {ratio[at]:.3g} "
                                 f"({np.count_nonzero(ratio > 1)} of {ratio.size} beyond the bound, {dtype})")  # fmt: skip
    return worst
