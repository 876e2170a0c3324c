"""The mixer itself: bytes to code and back, one after another, learning as it goes.

For each bit the experts predict, the mixer weighs them, the final maps correct it, the coder takes
it, and all of them learn it.  An encoder and a decoder that start alike stay alike.
"""

from typing import NamedTuple

import numpy as np

from bitbyte.compress.mixer import (
    bitmap,
    coder,
    contexts,
    expert,
    experts,
    final,
    matches,
    memory,
    mixing,
    slots,
    sound,
    trace,
)  # fmt: skip
from bitbyte.compress.mixer.kernel import kernel
from bitbyte.compress.mixer.slots import mixed
from bitbyte.compress.mixer.tables import EDGE, ONE, Tables, tables

MATCH_INPUTS = experts.N_CONTEXTS * experts.INPUTS  # where the inputs of matches begin
MODEL_INPUTS = MATCH_INPUTS + 2 * matches.N_MATCHES
BIAS = MODEL_INPUTS + expert.N_INPUTS
ORDERS = 7  # the first contexts are orders 1 to 7
START = 1  # place of the model's position in what its operations share


class Mixer(NamedTuple):
    """Everything that a mixer knows."""

    t: Tables
    past: contexts.Past
    experts: experts.Experts
    matches: matches.Matches
    model: expert.Expert
    mixing: mixing.Mixing
    final: final.Final
    buckets: np.ndarray  # see `slots`


def new_mixer(n_buckets: int, ring_bits: int) -> Mixer:
    """A mixer that knows nothing, with so many buckets and a memory of 2^ring_bits bytes."""
    t = tables()
    first = np.zeros(mixing.N_INPUTS, np.int32)
    first[:MATCH_INPUTS] = np.tile([4200, 1400, 0, 0, 0], experts.N_CONTEXTS)
    first[MATCH_INPUTS:MODEL_INPUTS] = np.tile([4200, 0], matches.N_MATCHES)
    first[MODEL_INPUTS:BIAS] = [20000, 6000, 6000, 0]
    groups = (
        contexts.new_past(ring_bits), experts.new_experts(t), matches.new_matches(t),
        expert.new_expert(t), mixing.new_mixing(first), final.new_final(t),
    )  # fmt: skip
    return Mixer(t, *(memory.in_one_block(group) for group in groups), slots.new_buckets(n_buckets))


@kernel
def choose_rows(z, shape, partial, bit, known):
    """Choose the weights of a bit by what is known of it."""
    m, past, t = z.mixing, z.past, z.t
    last4 = int(past.now[contexts.LAST4])
    c1, c2 = last4 & 0xFF, (last4 >> 8) & 0xFF
    long = short = 0
    if z.matches.map_M[0] >= 0 and z.matches.length_M[0]:
        long = min(15, 1 + matches.bucket(int(z.matches.length_M[0])) // 2)
    if z.matches.map_M[1] >= 0:
        short = min(int(z.matches.length_M[1]), 31) >> 2
    record = int(shape[contexts.RECORD])
    last = int(past.now[contexts.AT]) % record & 2047 if record else int(t.kind[c1]) << 8 | c2
    rows, first = m.row_S, mixing.FIRST_ROW
    rows[0] = long << 3 | short
    rows[1] = first[1] + partial
    rows[2] = first[2] + c1
    rows[3] = first[3] + (known << 3 | bit)
    rows[4] = first[4] + (int(t.kind[c1]) << 6 | int(t.kind[c2]) << 3 | bit)
    rows[5] = first[5] + last
    if shape[contexts.KIND] == contexts.BITMAP:
        bitmap.choose_rows(bitmap.around(past, partial, bit), rows)
    m.final_row[0] = int(z.model.about[0]) << 8 | partial
    m.final_row[1] = mixing.FINAL_ROWS[0] + ((known << 3 | bit) << 4 | long)


@kernel
def ask_for_maps(z, shape, likely, partial, bit):
    """Choose the contexts of the final maps."""
    last4 = int(z.past.now[contexts.LAST4])
    near, wide = (last4 & 0xFF) << 8 | partial, mixed(last4 & 0xFFFFFF, partial) >> 46
    if shape[contexts.KIND] == contexts.BITMAP:
        near = bitmap.around(z.past, partial, bit)
        wide = mixed(near, int(z.past.now[contexts.SIZES])) >> 46
    final.ask_for(z.final, 0, near)
    final.ask_for(z.final, 1, wide)
    final.ask_for(z.final, 2, likely << 8 | partial)
    final.ask_for(z.final, 3, mixed(int(z.past.now[contexts.WORD]), partial) >> 46)


@kernel
def predict_bit(z, shape, likely, partial, bit, has_model):
    """The probability of a 1, out of 65536.  ``likely``: a byte that an expert expects."""
    t, m = z.t, z.mixing
    ask_for_maps(z, shape, likely, partial, bit)
    known = experts.predict(z.experts, z.buckets, t, m.x_N, partial, bit, ORDERS)
    matches.predict(z.matches, t, m.x_N, MATCH_INPUTS, partial, bit)
    if has_model:
        expert.predict(z.model, t, m.x_N, MODEL_INPUTS, partial, bit)
    m.x_N[BIAS] = 256
    choose_rows(z, shape, partial, bit, known)
    st = mixing.mix(m)
    p = int(t.squash[st + EDGE])
    for which in range(final.N_FINAL):
        p += final.refine(z.final, st, which)
    return max(1, min(ONE - 1, p // 5))


@kernel
def learn_bit(z, partial, bit, value, has_model):
    """Teach all parts a bit, but the matches."""
    mixing.learn(z.mixing, z.t, value)
    final.learn(z.final, z.t, value)
    if has_model:
        expert.learn(z.model, z.t, value)
    experts.learn(z.experts, z.buckets, z.t, partial, bit, value)


@kernel
def expected(z):
    """The byte that a match expects, or 0, and its length class."""
    k = 0 if z.matches.byte_M[0] else 1
    return int(z.matches.byte_M[k]) | min(int(z.matches.length_M[k]), 15) << 9


@kernel
def begin_byte(z, shape):
    """Hash the contexts of the next byte, and ask for the buckets of its first half."""
    contexts.fill(z.past, shape, expected(z), z.experts.hash_C)
    if shape[contexts.KIND] == contexts.SOUND:
        sound.fill(z.past, shape, z.experts.hash_C)
    begin_half(z, shape, 1)


@kernel
def begin_half(z, shape, partial):
    """Hash the contexts of a half byte, and ask for its buckets."""
    own = shape[contexts.KIND] == contexts.BITMAP
    if own:
        bitmap.fill(z.past, shape, partial, z.experts.hash_C)
    experts.ask_for_buckets(z.experts, z.buckets, partial, own)


@kernel
def note_byte(z, shape, byte):
    """Note a byte that is known now, and begin the next one."""
    contexts.note(z.past, z.t.kind, byte)
    if shape[contexts.KIND] == contexts.SOUND:
        sound.note_size(z.past, shape)
    now = z.past.now
    matches.follow(z.matches, z.past.ring, int(now[contexts.MASK]), int(now[contexts.AT]))
    begin_byte(z, shape)


def code_bytes(z, shape, span, code, data, decoding, counts_TV, seen=None):
    """Code the bytes of ``data``, or fill it if ``decoding``; ``counts_TV`` is empty or a model's.

    ``z`` is a Mixer, ``shape`` says what was found about the data (see `contexts`), ``span`` is the
    coder's, ``code`` what it writes or reads.  ``seen`` is a Trace to be filled, or None.
    """
    has_model = len(counts_TV) > 0
    begin_byte(z, shape)
    for i in range(len(data)):
        if has_model:
            expert.read(z.model, counts_TV, i, z.t.log)
        byte = int(data[i])
        data[i] = code_byte(z, shape, span, code, byte, decoding, has_model, seen, 8 * i)


@kernel
def code_byte(z, shape, span, code, byte, decoding, has_model, seen, at):
    """Code a byte that was begun, or find it if ``decoding``, and begin the next one.

    The model was read before.  Bit 0 is bit ``at`` of the Trace ``seen``, which may be None.  What
    memory will be needed next is asked for as soon as it is known, before what can be learnt in the
    meantime.  Returns the byte.
    """
    likely = int(z.model.about[1]) if has_model else expected(z) & 0xFF
    partial = 1
    for bit in range(8):
        if bit & 3 == 0:
            experts.find_buckets(z.experts, z.buckets, partial)
        p = predict_bit(z, shape, likely, partial, bit, has_model)
        if seen is not None:
            trace.note(seen, z.mixing, at + bit, p)
        if decoding:
            value = coder.decode_bit(span, code, p)
        else:
            value = (byte >> (7 - bit)) & 1
            coder.encode_bit(span, code, value, p)
        matches.learn(z.matches, z.t, bit, value)
        before, partial = partial, partial << 1 | value
        if bit == 3:
            begin_half(z, shape, partial)
        if bit == 7:
            note_byte(z, shape, partial & 0xFF)
        learn_bit(z, before, bit, value, has_model)
    experts.end_byte(z.experts, z.buckets, partial & 0xFF)
    return partial & 0xFF


def decode_next(z, shape, span, code, data, at, counts_TV, ids, context):
    """Find data[at] with the model's counts of it, and make the model go on with that byte.

    An operation that follows a native model's step, see `kernels.native.engine`.  The first byte
    was begun before.
    """
    i = int(at[0])
    expert.read(z.model, counts_TV, 0, z.t.log)
    data[i] = code_byte(z, shape, span, code, 0, True, True, None, 0)
    at[0] = i + 1
    ids[0] = data[i]
    context[START] += 1
