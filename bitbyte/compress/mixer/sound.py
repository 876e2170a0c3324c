"""Contexts of sound: the sizes of the newest residuals of `pcm`, over short and long times."""

from bitbyte.compress.mixer.contexts import AT, LAST4, SIZES, START, WIDTH
from bitbyte.compress.mixer.kernel import kernel
from bitbyte.compress.mixer.slots import mixed

N_SIZES = 5  # running means of the sizes, of about 1, 4, 16, 64 and 256 samples
SIZE_BITS = 8  # fraction bits of their values


@kernel
def place(past, shape):
    """Which byte of a sample is next, 0 the highest."""
    return (int(past.now[AT]) - int(shape[START])) % int(shape[WIDTH])


@kernel
def note_size(past, shape):
    """After a sample's last byte: take its residual into the running means."""
    if place(past, shape):
        return
    width = int(shape[WIDTH])
    size = int(past.now[LAST4]) & ((1 << (8 * width)) - 1)
    for i in range(N_SIZES):
        mean = int(past.now[SIZES + i])
        past.now[SIZES + i] = mean + (((size << SIZE_BITS) - mean) >> (2 * i))


@kernel
def _class(value, steps):
    """Logarithm of a value, in 2^steps classes to an octave."""
    bits = 0
    while value >> bits > (1 << steps):
        bits += 1
    return (bits << steps) + (value >> bits)


@kernel
def fill(past, shape, hash_C):
    """Replace contexts of texts by contexts of sizes."""
    k = place(past, shape)
    head = (int(past.now[LAST4]) & ((1 << (8 * k)) - 1)) << 2 | k  # the sample's bytes so far
    now = past.now
    a, b, c = int(now[SIZES]), int(now[SIZES + 1]), int(now[SIZES + 2])
    d, e = int(now[SIZES + 3]), int(now[SIZES + 4])
    hash_C[3] = mixed(mixed(23, head), _class(a, 2) << 8 | _class(c, 2))
    hash_C[4] = mixed(mixed(24, head), _class(b, 2) << 8 | _class(d, 2))
    hash_C[5] = mixed(mixed(25, head), _class(c, 1) << 8 | _class(e, 2))
    hash_C[6] = mixed(mixed(26, head), _class(a, 1) << 8 | _class(b, 1) << 16 | _class(c, 1))
    hash_C[8] = mixed(mixed(27, head), _class(b, 3))
    hash_C[9] = mixed(mixed(28, head), _class(c, 3))
    hash_C[10] = mixed(mixed(29, head), _class(d, 3))
    hash_C[13] = mixed(mixed(30, head), _class(e, 3))
    hash_C[16] = mixed(mixed(31, head), _class(b, 2) << 8 | _class(c, 2))
    hash_C[18] = mixed(mixed(32, head), _class(c, 2) << 8 | _class(d, 2))
