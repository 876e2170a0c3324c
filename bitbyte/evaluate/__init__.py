"""Evaluation: result records, confidence intervals, leak checks, the entropy lens, tables."""

from bitbyte import face

__getattr__ = face(
    __name__,
    {
        "evaluate.evaluation": "evaluate floor_bits sha256_of",
        "evaluate.bootstrap": "ONE_RUN bootstrap_interval paired_bootstrap paired_seeds",
        "evaluate.records": "read_records write_record",
        "scoring": "KINDS Score Uniform bits_per_byte kind_of score score_stream surprisal windows",
    },
    renamed="compare:paired_bootstrap interval:bootstrap_interval",
)
