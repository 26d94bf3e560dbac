"""The GPU's approximate reciprocal, bit for bit, on the host."""

from __future__ import annotations

import numpy as np

from .problem import MAX_NUM_SMS


def _numbers(text: str) -> frozenset[int]:
    return frozenset(map(int, text.split()))


# Odd numbers up to 1023 at which PTX `rcp.approx.ftz.f32` (MUFU.RCP) differs from the correctly rounded
# 1/x, by one ulp each: measured on an H200. The mantissa of 1/(2x) is that of 1/x, so these say it for
# every even number too.
_ONE_ULP_BELOW = _numbers("33 37 75 139 255 495 515 519 535 543 547 555 575 619 649 749 791 819 987 989 1017 ")
_ONE_ULP_ABOVE = _numbers(
    "61 67 83 97 123 141 165 179 189 193 209 219 237 243 249 261 293 307 319 321 355 397 425 431 437 475 503 "
    "521 561 581 625 661 685 705 739 741 761 837 905 949 951 "
)


def approximate_reciprocal(num_sms: int) -> np.float32:
    """What `1.0f / num_sms` is in an FA3 wheel: they are built with fast math, hence `rcp.approx.ftz`.

    The last bit decides schedules: with 132 SMs, totals of 120 * k blocks sit on the boundary.
    `num_sms` must be from 1 to 1024.
    """
    if not 1 <= num_sms <= MAX_NUM_SMS:
        raise ValueError(f"num_sms must be from 1 to {MAX_NUM_SMS}, got {num_sms}")
    odd = num_sms // (num_sms & -num_sms)
    ulps = (odd in _ONE_ULP_ABOVE) - (odd in _ONE_ULP_BELOW)
    rounded = np.float32(1) / np.float32(num_sms)
    return (rounded.view(np.int32) + np.int32(ulps)).view(np.float32)
