"""`ral_divergence_params` of csrc/include/ral/policy.h."""

from __future__ import annotations

import ctypes
from ctypes import c_int32, c_int64, c_void_p


class Params(ctypes.Structure):
    """`ral_divergence_params`."""

    _fields_ = [
        ("num_rows", c_int64),
        ("length", c_int64),
        ("p", c_void_p),
        ("r", c_void_p),
        ("value", c_void_p),
        ("dp", c_void_p),
        ("dr", c_void_p),
        ("kind", c_int32),
        ("isa", c_int32),
        ("num_threads", c_int32),
    ]
