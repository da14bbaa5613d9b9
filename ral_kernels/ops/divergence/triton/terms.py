"""Terms of the divergences on the device, free of cancellation (equations: README.md)."""

# mypy: disable-error-code="no-untyped-def"

import triton
import triton.language as tl

JSD = tl.constexpr(0)  # the order of arguments.KINDS
KL = tl.constexpr(1)
REVERSE_KL = tl.constexpr(2)
CROSS_ENTROPY = tl.constexpr(3)

_SMALLEST_NORMAL = tl.constexpr(1.17549435e-38)
_LARGEST = tl.constexpr(3.4e38)
_LOG_2_24 = tl.constexpr(16.635532333438686)


@triton.jit
def atanh_series(s):
    """atanh(s) for |s| <= 0.18, to a rounding."""
    z = s * s
    series = 1.0 / 7.0 + z * (1.0 / 9.0 + z * (1.0 / 11.0))
    return s + s * z * (1.0 / 3.0 + z * (1.0 / 5.0 + z * series))


@triton.jit
def log_of(x):
    """log(x) for x >= 0. The library's logarithm may take subnormal numbers for 0."""
    small = x < _SMALLEST_NORMAL
    return tl.log(tl.where(small, x * 16777216.0, x)) - tl.where(small, _LOG_2_24, 0.0)


@triton.jit
def log_or_0(x):
    """log(x) for x > 0, and 0 for x = 0."""
    return log_of(tl.where(x == 0.0, 1.0, x))


@triton.jit
def log_quotient(a, b, s):
    """log(a / b) for a, b > 0, with s = (a - b) / (a + b) from the unrounded difference: (5)."""
    y = a / b
    normal = (y > _SMALLEST_NORMAL) & (y < _LARGEST)
    far = tl.where(normal, tl.log(tl.where(normal, y, 1.0)), log_of(a) - log_of(b))
    return tl.where(tl.abs(s) < 0.17, 2.0 * atanh_series(s), far)


@triton.jit
def relative_difference(p, r):
    """x = (p - r) / (p + r), and 0 where both are 0: (4)."""
    total = p + r
    return (p - r) / tl.where(total == 0.0, 1.0, total)


@triton.jit
def jsd_terms(p, r, x):
    z = x * x
    series = 1.0 / 30.0 + z * (1.0 / 56.0 + z * (1.0 / 90.0 + z * (1.0 / 132.0)))
    near = 0.5 * (p + r) * z * (0.5 + z * (1.0 / 12.0 + z * series))  # (6)
    # log(p/m) as a quotient with its own s: (p - m) / (p + m) = x / (2 + x).
    m = 0.5 * (p + r)
    p_term = tl.where(p == 0.0, 0.0, p * log_quotient(p, m, x / (2.0 + x)))
    r_term = tl.where(r == 0.0, 0.0, r * log_quotient(r, m, -x / (2.0 - x)))
    return tl.where(z < 0.0625, near, 0.5 * (p_term + r_term))  # (1)


@triton.jit
def kl_terms(a, b, x, GENERALISED: tl.constexpr):
    """a log(a/b), or with GENERALISED that - a + b >= 0; +inf where b = 0 < a; x is of (a, b).

    Only close a and b take the latter for the former. In rows far from normalised, - a + b would
    cancel with what takes it back.
    """
    z = x * x
    q = 1.0 / 7.0 + z * (1.0 / 9.0 + z * (1.0 / 11.0 + z * (1.0 / 13.0)))
    q = 1.0 / 3.0 + z * (1.0 / 5.0 + z * q)
    near = (a + b) * z * (1.0 + x * (1.0 + x) * q)  # (7)
    far = a * log_quotient(a, b, x)
    alone = b  # the term where a is 0
    if GENERALISED:
        far = far - a + b
    else:
        near += a - b
        alone = tl.zeros_like(b)
    term = tl.where(z < 0.1, near, far)
    return tl.where(a == 0.0, alone, tl.where(b == 0.0, a * float("inf"), term))


@triton.jit
def divergence_terms(p, r, KIND: tl.constexpr, GENERALISED: tl.constexpr):
    """The terms of (1) to (3) and (12). With GENERALISED those of kl keep − p + r, and are >= 0."""
    x = relative_difference(p, r)
    if KIND == JSD:
        terms = jsd_terms(p, r, x)
    elif KIND == KL:
        terms = kl_terms(p, r, x, GENERALISED)
    elif KIND == REVERSE_KL:
        terms = kl_terms(r, p, -x, GENERALISED)
    else:
        term = tl.where(p == 0.0, r * float("inf"), -r * log_or_0(p))  # (12)
        terms = tl.where(r == 0.0, 0.0, term)
    return terms


@triton.jit
def divergence_gradient(p, r, KIND: tl.constexpr, GENERALISED: tl.constexpr):
    """∂term/∂p; 0 where p is 0, and where r = 0 < p makes the row infinite."""
    x = relative_difference(p, r)
    if KIND == JSD:
        gradient = 0.5 * log_quotient(p, 0.5 * (p + r), x / (2.0 + x))  # (8)
    elif KIND == KL:
        gradient = log_quotient(p, r, x)  # (9)
        if not GENERALISED:
            gradient += 1.0
        gradient = tl.where(r == 0.0, 0.0, gradient)
    else:
        difference = p - r if GENERALISED else -r
        quotient = difference / tl.where(p == 0.0, 1.0, p)  # (10)
        # Bounded, so that a subnormal p does not turn sums over the row into infinities.
        gradient = tl.where(quotient < -1e34, -1e34, quotient)
    return tl.where(p == 0.0, 0.0, gradient)


@triton.jit
def divergence_gradient_of_r(p, r, KIND: tl.constexpr, GENERALISED: tl.constexpr):
    """∂term/∂r; 0 where r is 0, and where p = 0 < r makes the row infinite."""
    if KIND == CROSS_ENTROPY:
        gradient = tl.where(r == 0.0, 0.0, -log_or_0(p))  # (12)
    else:
        swapped: tl.constexpr = JSD if KIND == JSD else 3 - KIND  # kl and reverse_kl
        gradient = divergence_gradient(r, p, swapped, GENERALISED)  # (11)
    return gradient
