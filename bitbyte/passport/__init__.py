"""Passports: one audited number, in bits per byte, for any model or compressor."""

from bitbyte import face

__getattr__ = face(
    __name__,
    {
        "passport.issue": "passport",
        "passport.cards": "card",
        "passport.find": "open_subject",
        "passport.subjects": "Function NGram OfModel Uniform",
        "evaluate.subject": "NotGivenBackError Subject",
    },
)
