"""The mixer itself: bytes to code and back, one after another, learning as it goes."""

from typing import NamedTuple

import numpy as np

from bitbyte.compress.mixer import coder, contexts, experts, final, matches, mixing, sound
from bitbyte.compress.mixer.tables import EDGE, Tables, tables

MATCH_INPUTS = experts.N_CONTEXTS * experts.INPUTS
MODEL_INPUTS = MATCH_INPUTS + 2 * matches.N_MATCHES
BIAS = MODEL_INPUTS + 4
ORDERS = 7  # the first contexts are orders 1 to 7


class Mixer(NamedTuple):
    """Everything that a mixer knows."""

    t: Tables
    past: contexts.Past
    experts: experts.Experts
    matches: matches.Matches
    mixing: mixing.Mixing
    final: final.Final


def new_mixer(bucket_bits: int, ring_bits: int) -> Mixer:
    t = tables()
    first = np.zeros(mixing.N_INPUTS, np.int32)
    first[:MATCH_INPUTS] = np.tile([4200, 1400, 0, 0], experts.N_CONTEXTS)
    first[MATCH_INPUTS:MODEL_INPUTS] = np.tile([4200, 0], matches.N_MATCHES)
    first[MODEL_INPUTS:BIAS] = [20000, 6000, 6000, 0]
    return Mixer(
        t, contexts.new_past(ring_bits), experts.new_experts(bucket_bits, t),
        matches.new_matches(t), mixing.new_mixing(first), final.new_final(t),
    )  # fmt: skip


def choose_rows(z, shape, partial, bit, known):
    """Choose the rows of weights of a bit, all but those of the final maps."""
    m, past, t = z.mixing, z.past, z.t
    last4 = int(past.now[contexts.LAST4])
    c1, c2 = last4 & 0xFF, (last4 >> 8) & 0xFF
    long = min(int(z.matches.length_M[0]), 15) if z.matches.map_M[0] >= 0 else 0
    if long:
        long = min(15, 1 + matches.bucket(int(z.matches.length_M[0])) // 2)
    short = min(int(z.matches.length_M[1]), 31) >> 2 if z.matches.map_M[1] >= 0 else 0
    record = int(shape[contexts.RECORD])
    last = int(past.now[contexts.AT]) % record & 2047 if record else c2
    rows = m.row_S
    rows[0] = long << 3 | short
    rows[1] = mixing.FIRST_ROW[1] + partial
    rows[2] = mixing.FIRST_ROW[2] + c1
    rows[3] = mixing.FIRST_ROW[3] + (known << 3 | bit)
    rows[4] = mixing.FIRST_ROW[4] + (int(t.kind[c1]) << 6 | int(t.kind[c2]) << 3 | bit)
    rows[5] = mixing.FIRST_ROW[5] + last
    m.final_row[0] = partial
    m.final_row[1] = mixing.FINAL_ROWS[0] + ((known << 3 | bit) << 4 | long)


def code_byte(z, shape, span, code, byte, decoding, bucket_bits, buffer_mask):
    """Code ``byte``, or find it if ``decoding``; learns it and returns it."""
    t, m, past = z.t, z.mixing, z.past
    matched = int(z.matches.byte_M[0])
    if not matched:
        matched = int(z.matches.byte_M[1])
        length = min(int(z.matches.length_M[1]), 15)
    else:
        length = min(int(z.matches.length_M[0]), 15)
    expected = matched | length << 9
    contexts.fill(past, shape, expected, z.experts.hash_C)
    if shape[contexts.KIND] == contexts.SOUND:
        sound.fill(past, shape, z.experts.hash_C)
    last4 = int(past.now[contexts.LAST4])
    c1 = last4 & 0xFF
    orders = contexts.mixed(1, last4 & 0xFFFFFF)
    partial = 1
    for bit in range(8):
        if bit & 3 == 0:
            experts.find_buckets(z.experts, bucket_bits, partial)
        known = experts.predict(z.experts, t, m.x_N, partial, bit, ORDERS)
        matches.predict(z.matches, t, m.x_N, MATCH_INPUTS, partial, bit)
        m.x_N[BIAS] = 256
        choose_rows(z, shape, partial, bit, known)
        st = mixing.mix(m)
        a0 = final.refine(z.final, st, 0, c1 << 8 | partial)
        a1 = final.refine(z.final, st, 1, contexts.mixed(orders, partial) >> 46)
        a2 = final.refine(z.final, st, 2, (matched & 0xFF) << 8 | partial)
        p = (int(t.squash[st + EDGE]) + a0 + a1 + a2) >> 2
        p = max(1, min(65535, p))
        if decoding:
            value = coder.decode_bit(span, code, p)
        else:
            value = (byte >> (7 - bit)) & 1
            coder.encode_bit(span, code, value, p)
        mixing.learn(m, t, value)
        final.learn(z.final, t, value)
        matches.learn(z.matches, t, bit, value)
        experts.learn(z.experts, t, partial, bit, value)
        partial = partial << 1 | value
    byte = partial & 0xFF
    experts.end_byte(z.experts, byte)
    contexts.note(past, t.kind, byte)
    if shape[contexts.KIND] == contexts.SOUND:
        sound.note_size(past, shape)
    matches.follow(z.matches, past.ring, buffer_mask, int(past.now[contexts.AT]))
    return byte


def code_bytes(z, shape, span, code, data, decoding, bucket_bits):
    """Code the bytes of ``data``, or fill it if ``decoding``."""
    mask = len(z.past.ring) - 1
    for i in range(len(data)):
        data[i] = code_byte(z, shape, span, code, int(data[i]), decoding, bucket_bits, mask)
