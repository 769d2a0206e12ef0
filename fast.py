"""The same, faster: second forms of tiny_sd.py's primitives, which give the same numbers in less time.

Not a line of this is needed. tiny_sd.py defines each primitive by its formula and runs by the formulas alone where this file
is missing; where it is there, `faster` puts each form below in the place of the formula that it is named after. The formula
stays at hand, as `conv2d.formula`, and tests/test_fast.py compares the two. Nothing else in the program knows.
"""

import contextlib
import ctypes
import functools
import math
import mmap
import os
import threading
import weakref
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import numpy as np

from tiny_sd import by_row, conv2d, dot_product_attention, gelu, group_norm, layer_norm, linear, sigmoid, silu

# ── 10. The same, faster ──────────────────────────────────────────────────────────────────────────── NOTES §10 ──
# The lesson is over; the rest is efficiency. Three ideas carry all of it. Fewer multiplications: Winograd's convolution
# needs a quarter of them. Short ways: the work goes block by block, so that what lies between two steps stays in the
# cache. All cores: NumPy lets go of Python's lock inside each operation, so plain threads compute side by side.

cores = len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count()
pool, idle = ThreadPoolExecutor(cores), threading.Semaphore(cores - 1)
for library in Path(np.__file__).parents[1].glob("numpy.libs/*openblas*"):      # BLAS' threads, if NumPy was imported before
    with contextlib.suppress(OSError, AttributeError):
        ctypes.CDLL(str(library)).scipy_openblas_set_num_threads64_(1)

def parallel(work, items):
    """[work(item), ...], computed by the calling thread and by as many more as there are idle cores. Calls may nest: the
    two halves of guidance take a core each, and the blocks inside them find more only where there are more."""
    keep_freed_memory()
    items, helpers = list(items), []
    if len(items) == 1:
        return [work(items[0])]
    results, queue = [None] * len(items), iter(range(len(items)))      # shared: to take the next number is atomic

    def drain():
        for i in queue:
            results[i] = work(items[i])

    def help():
        try:
            drain()
        finally:
            idle.release()

    while len(helpers) < len(items) - 1 and idle.acquire(blocking=False):
        helpers.append(pool.submit(help))
    drain()
    for helper in helpers:
        helper.result()
    return results

@functools.cache
def keep_freed_memory():
    """Has glibc keep what is freed for the next array: the system zeroes each page that it gives out anew."""
    with contextlib.suppress(OSError, AttributeError, TypeError):
        for option, value in (-8, 1), (-4, 0), (-1, 2 ** 31 - 1):       # M_ARENA_MAX, M_MMAP_MAX, M_TRIM_THRESHOLD
            ctypes.CDLL(None).mallopt(option, value)

def blocks(length, size):
    """The slices 0:size, size:2 size, ... that cover `length`."""
    size = max(1, size)
    return [slice(i, min(i + size, length)) for i in range(0, length, size)]

def shares(length, multiplications):
    """The slices of `length` for the cores, or all of it in one where waking another core takes longer."""
    return blocks(length, -(-length // (cores if multiplications > 2 ** 22 else 1)))

def once(prepare):
    """Remembers prepare(weight, ...) for as long as the weight lives: replace a weight, rather than change it in place."""
    known, lock = {}, threading.Lock()

    def prepared(weight, *args):
        key = id(weight), *args
        with lock:
            if key not in known:
                known[key] = prepare(weight, *args)
                weakref.finalize(weight, known.pop, key)
                while isinstance(weight, np.ndarray):
                    weight = weight.base
                if hasattr(weight, "madvise"):      # a file in memory: the pages that were read need not stay
                    weight.madvise(mmap.MADV_DONTNEED)
            return known[key]
    return prepared

def faster(operation):
    """Gives an operation a second form, which runs in place of its formula on NumPy arrays."""
    def register(form):
        operation.on_numpy = form
        return form
    return register

def rowwise(formula):
    """A formula that treats each row, a place or a token, alike, in blocks of rows that fit in the cache."""
    def blockwise(x, *args, **kwargs):
        if x.size <= 2 ** 18:
            return formula(x, *args, **kwargs)
        rows = x.reshape(-1, x.shape[-1])
        out = np.empty_like(rows)

        def block(s):
            out[s] = formula(rows[s], *args, **kwargs)
        parallel(block, blocks(len(rows), 2 ** 16 // rows.shape[1]))
        return out.reshape(x.shape)
    return blockwise

for operation in (sigmoid, silu, layer_norm):
    operation.on_numpy = rowwise(operation.formula)

@faster(gelu)
@rowwise
def gelu_by_tanh(x):
    """x (1 + tanh(x P(x²))) / 2, half the work of the exponential and the quotient. The usual P of two terms is off by 5e-4;
    these seven are fitted to erf and off by 2e-7."""
    square = np.minimum(x * x, 100)
    y = 1.81395855e-09 * square
    for a in (-1.33784595e-07, 3.97409336e-06, -5.52735518e-05, -3.30261532e-05, 3.63341484e-02):
        y += a
        y *= square
    y += 7.97884269e-01
    y *= x
    return x * (0.5 + 0.5 * np.tanh(y, out=y))

@faster(by_row)
def threaded_by_row(x, work):
    """A core for each row, where there are as many."""
    return np.concatenate(parallel(work, [x[i:i + 1] for i in range(len(x))]))

@faster(linear)
def blocked_linear(x, weight, bias=None):
    """A part of the rows, or of the columns if there are more of them, for each core."""
    w, rows = weight.reshape(len(weight), -1).T, x.reshape(-1, x.shape[-1])
    out = np.empty((len(rows), len(weight)), x.dtype)

    def block(s):
        a, b, y = (rows[s], w, out[s]) if len(rows) > len(weight) else (rows, w[:, s], out[:, s])
        np.matmul(a, b, out=y)
    parallel(block, shares(max(out.shape), rows.size * len(weight)))
    if bias is not None:
        out += bias
    return out.reshape(*x.shape[:-1], -1)

@faster(group_norm)
def blocked_group_norm(x, groups, eps, weight, bias):
    """One scale and one shift per channel; sums in float32 within a block of places, in float64 over the blocks."""
    B, H, W, C = x.shape
    rows, out = x.reshape(B, H * W, C), np.empty((B, H * W, C), x.dtype)
    places = [(i, s) for i in range(B) for s in blocks(H * W, 2 ** 17 // C)]

    def average(sums):      # over the places and channels of a group, once for each of its channels: (B, C)
        sums = np.array(parallel(sums, places), np.float64).reshape(B, -1, groups, C // groups).sum((1, 3))
        return np.repeat(sums / (H * W * C // groups), C // groups, axis=1).astype(x.dtype)

    mean = average(lambda at: rows[at].sum(0))
    variance = average(lambda at: np.square(rows[at] - mean[at[0]]).sum(0))
    scale = weight / np.sqrt(variance + np.float32(eps))
    shift = bias - mean * scale

    def block(at):
        np.multiply(rows[at], scale[at[0]], out=out[at])
        out[at] += shift[at[0]]
    parallel(block, places)
    return out.reshape(x.shape)

@faster(conv2d)
def fast_conv2d(x, weight, bias=None, stride=1, padding=(1, 1)):
    """The way that suits the sizes: Winograd's for 3x3 filters of many channels, else one product of all windows."""
    out, kh, kw, c = weight.shape
    places = x.shape[1] * x.shape[2]        # with few of them, reading the larger filters takes the longest
    if (kh, kw, stride, padding) == (3, 3, 1, (1, 1)) and min(c, out) >= 32 and places >= 256:
        return winograd(x, weight, bias, 4 if places >= 1024 else 2)
    return im2col(x, weight, bias, stride, padding)

def windows(x, size, stride, padding):
    """All windows of x, which gets the zeros around it that np.pad would give it but faster, as a view
    (batch, rows, columns, height, width, channels); size (height, width)."""
    (top, bottom), (left, right) = padding
    B, H, W, C = x.shape
    padded = np.zeros((B, top + H + bottom, left + W + right, C), x.dtype)
    padded[:, top:top + H, left:left + W] = x
    (b, i, j, c), (h, w) = padded.strides, ((n - k) // stride + 1 for n, k in zip(padded.shape[1:3], size))
    return np.lib.stride_tricks.as_strided(padded, (B, h, w, *size, C), (b, stride * i, stride * j, i, j, c))

@once
def matrix(weight):
    """A convolution's weight (out, kh, kw, in) as (kh kw in, out), in float32."""
    return np.ascontiguousarray(weight.reshape(len(weight), -1).T, np.float32)

def im2col(x, weight, bias, stride, padding):
    """Each window as a row of one matrix product; a few rows of the picture at a time, since the windows overlap."""
    out, kh, kw, c = weight.shape
    view, w = windows(x, (kh, kw), stride, (padding, padding)), matrix(weight)
    B, H, W = view.shape[:3]
    y = np.empty((B, H, W, out), x.dtype)

    def block(at):
        np.matmul(view[at].reshape(-1, kh * kw * c), w, out=y[at].reshape(-1, out))
        if bias is not None:
            y[at] += bias
    parallel(block, [(i, s) for i in range(B) for s in blocks(H, 2 ** 20 // (W * kh * kw * c))])
    return y

def toom_cook(m):
    """A, G, B such that y = Aᵀ (G g * Bᵀ d) correlates m + 2 numbers d with the 3 of g. To multiply two polynomials:
    evaluate both at m + 2 points, multiply, interpolate; to correlate is the transpose of that (Winograd, 1980). The
    last point is infinity, which gives the leading coefficient; points near 1 round best."""
    points = {2: [0, 1, -1], 4: [0, 3 / 4, -3 / 4, 3 / 2, -3 / 2]}[m]
    A, G, V = (np.vstack([np.vander(points, k, increasing=True), np.eye(k)[-1]]) for k in (m, 3, m + 2))
    return A, G, np.linalg.inv(V)

@functools.cache
def both_ways(m):
    """The Kronecker squares of A, G, B, which apply each to the height and to the width of a tile at once."""
    return [np.kron(matrix, matrix).astype(np.float32) for matrix in toom_cook(m)]

@once
def spectrum(weight, m):
    """Each filter as G g Gᵀ: ((m + 2)², in, out)."""
    out, _, _, c = weight.shape
    U = np.empty(((m + 2) ** 2, c, out), np.float32)

    def block(s):
        g = np.asarray(weight[..., s].transpose(1, 2, 3, 0), np.float32)
        U[:, s] = (both_ways(m)[1] @ g.reshape(9, -1)).reshape(len(U), -1, out)
    parallel(block, blocks(c, 2 ** 15 // out))
    return U

def winograd(x, weight, bias, m):
    """A 3x3 convolution with ((m + 2) / 3m)² of the multiplications, for m = 4 a quarter (Lavin and Gray, 2015).

    Tiles of (m + 2)² places overlap by two. One matrix transforms each tile; then place p of all tiles meets place p of
    all filters in a product over the channels; and one matrix more turns the sums into the m² places of the result.
    """
    (A, _, B), U, (n, H, W, C), out = both_ways(m), spectrum(weight, m), x.shape, len(weight)
    down, across = -(-H // m), -(-W // m)
    tiles = windows(x, (m + 2, m + 2), m, ((1, down * m + 1 - H), (1, across * m + 1 - W)))
    y = np.empty((n, down, m, across, m, out), x.dtype)

    def block(s):           # about 128 tiles, so that all three steps find them in the cache
        V = (B.T @ tiles[:, s].transpose(3, 4, 0, 1, 2, 5).reshape(len(B), -1)).reshape(len(B), -1, C)
        Y = np.empty((*V.shape[:2], out), x.dtype)

        def product(p):
            np.matmul(V[p], U[p], out=Y[p])
        parallel(product, shares(len(B), V.size * out))
        places = (A.T @ Y.reshape(len(B), -1)).reshape(m, m, n, -1, across, out)
        y[:, s] = (places if bias is None else places + bias).transpose(2, 3, 0, 4, 1, 5)

    parallel(block, blocks(down, 128 // (n * across)))
    return y.reshape(n, down * m, across * m, out)[:, :H, :W]

@faster(dot_product_attention)
def blocked_attention(q, k, v, causal=False):
    """Without ever holding all scores: 1024 queries meet 256 keys at a time, and the numerator and the denominator of
    the softmax are both sums over such blocks (Rabe and Staats, 2021)."""
    if causal or math.prod(q.shape[:-1]) * k.shape[-2] <= 2 ** 17:
        return dot_product_attention.formula(q, k, v, causal)
    out = np.empty(q.shape[:-1] + v.shape[-1:], q.dtype)
    k = (k - k.mean(axis=-2, keepdims=True)) * (math.log2(math.e) / math.sqrt(q.shape[-1]))    # eˢ = 2^(s log₂e)
    bound = np.sqrt((q * q).sum(-1).max(-1) * (k * k).sum(-1).max(-1))              # |q·k| <= |q| |k|

    def block(at):
        head, rows = at[:2], at[2]
        powers = plain_powers if bound[head] <= 100 else guarded_powers
        total, weight = powers(q[at], k[head], v[head])
        np.divide(total, weight[:, None], out=out[at])
    parallel(block, [(*head, rows) for head in np.ndindex(q.shape[:2]) for rows in blocks(q.shape[2], 1024)])
    return out

def plain_powers(q, k, v):
    """Σ 2^(q·k) v and Σ 2^(q·k) where no exponent exceeds 100: the shift that softmax cancels is not needed."""
    total, weight = 0, 0
    for s in blocks(len(k), 256):
        p = q @ k[s].T
        np.exp2(p, out=p)
        total += p @ v[s]
        weight += p @ np.ones(p.shape[1], p.dtype)      # a sum over the row, as a product: faster than sum
    return total, weight

def guarded_powers(q, k, v):
    """The same over 2^(largest exponent so far), with the sums rescaled whenever that grows (Milakov and Gimelshein,
    2018); by exp, since exp2 is ten times slower where it underflows."""
    total, weight, largest = 0, 0, np.float32(-np.inf)
    for s in blocks(len(k), 256):
        p = q @ k[s].T * math.log(2)
        previous, largest = largest, np.maximum(largest, p.max(-1))
        p = np.exp(p - largest[:, None])
        shrink = np.exp(previous - largest)
        total, weight = total * shrink[:, None] + p @ v[s], weight * shrink + p.sum(-1)
    return total, weight
