"""Spherical interpolation of two models that keeps the norm (Shoemake 1985; norm as in Goddard et al. 2024, MergeKit).

The direction goes along the great circle from that of x to that of m, the length from |x| to |m| in a straight
line. A mean of two models that point apart is shorter than either; this one is not. Unit vectors whose lengths are
forgotten are what the often published SLERP merges, and those stay at chance.

Opposite directions have no shortest arc: there the nearer one is kept (x at the middle). A zero vector has no
direction: there the way is straight. Coordinates from `parameters` on (the buffers: see `averaging`) are
interpolated in a straight line and are no part of the angle.

Left out: an angle for each layer. Two passes over the models, in slices.
"""

from __future__ import annotations

import numpy as np

from gossipml.models.arrays import A, Few, empty, few, like, slices

OPPOSITE = -1 + 1e-6  # a cosine below: the arc is known to less than a thousandth in float32
PARALLEL = 1e-4  # an angle below: sines are their arguments in float32


def slerp(x: A, m: A, weight: A, parameters: int | None = None) -> A:
    """x, m: (..., P); weight: (...) or one number, 0 gives x and 1 gives m. slerp(x, m, w) is slerp(m, x, 1 - w)."""
    bound = x.shape[-1] if parameters is None else parameters
    share: Few = few(weight)
    own, theirs = _coefficients(*_products(x[..., :bound], m[..., :bound]), share)
    a, b = like(x, own)[..., None], like(x, theirs)[..., None]  # (..., 1)
    result = empty(x, x.shape)
    for piece in slices(x[..., :bound]):
        result[..., piece] = a * x[..., piece] + b * m[..., piece]
    if bound < x.shape[-1]:
        rest = slice(bound, None)
        result[..., rest] = x[..., rest] + like(x, share)[..., None] * (m[..., rest] - x[..., rest])
    return result


def _products(x: A, m: A) -> tuple[Few, Few, Few]:
    """Inner products (x, x), (m, m), (x, m) of the last axis."""
    totals = [np.zeros(x.shape[:-1]) for _ in range(3)]
    for piece in slices(x):
        p, q = x[..., piece], m[..., piece]
        for total, product in zip(totals, (p * p, q * q, p * q), strict=True):
            total += few(product.sum(-1))
    return totals[0], totals[1], totals[2]


def _coefficients(xx: Few, mm: Few, xm: Few, w: Few) -> tuple[Few, Few]:
    """What x and m are multiplied with; all (...)."""
    lengths = np.sqrt(xx), np.sqrt(mm)
    flat = (lengths[0] == 0) | (lengths[1] == 0)
    product = np.where(flat, 1.0, lengths[0] * lengths[1])
    cosine = np.clip(xm / product, -1.0, 1.0)
    opposite = ~flat & (cosine < OPPOSITE)
    angle = np.arccos(cosine)
    sine = np.where((angle < PARALLEL) | opposite, 1.0, np.sin(angle))
    a = np.where(angle < PARALLEL, 1 - w, np.sin((1 - w) * angle) / sine)
    b = np.where(angle < PARALLEL, w, np.sin(w * angle) / sine)
    a, b = np.where(opposite, w <= 0.5, a), np.where(opposite, w > 0.5, b)
    length = np.sqrt(a * a + b * b + 2 * a * b * cosine)  # 1, but for rounding and a small angle
    length = np.where(flat, 1.0, length)
    wanted = (1 - w) * lengths[0] + w * lengths[1]
    safe = [np.where(flat, 1.0, norm) * length for norm in lengths]
    return np.where(flat, 1 - w, a * wanted / safe[0]), np.where(flat, w, b * wanted / safe[1])
