"""Round numbers along an axis, linear or logarithmic."""

from __future__ import annotations

import math


def linear_ticks(low: float, high: float, count: int = 5) -> list[float]:
    """About `count` round numbers (1, 2 or 5 times a power of ten apart) from low to high."""
    if not high > low:
        return [low]
    rough = (high - low) / count
    power = 10.0 ** math.floor(math.log10(rough))
    step = next(factor * power for factor in (1, 2, 5, 10) if factor * power >= rough * 0.999)
    first = math.ceil(low / step - 1e-9)
    return [number * step for number in range(first, math.floor(high / step + 1e-9) + 1)]


def power_ticks(low: float, high: float, count: int = 6) -> list[float]:
    """Powers of ten from low to high, every one or every n-th."""
    first = math.floor(math.log10(low))
    last = max(math.ceil(math.log10(high)), first + 1)
    every = max(1, math.ceil((last - first) / count))
    return [10.0**exponent for exponent in range(first, last + 1, every)]


def tick_text(value: float, percent: bool = False) -> str:
    if percent:
        return f"{100 * value:.10g} %"
    if value and not 1e-3 <= abs(value) < 1e5:
        mantissa, exponent = f"{value:.0e}".split("e")
        sign = "\N{MINUS SIGN}" if int(exponent) < 0 else ""
        digits = "".join("⁰¹²³⁴⁵⁶⁷⁸⁹"[int(digit)] for digit in str(abs(int(exponent))))
        head = "" if mantissa == "1" else f"{mantissa}·"
        return f"{head}10{'⁻' if sign else ''}{digits}"
    return f"{value:,.10g}"
