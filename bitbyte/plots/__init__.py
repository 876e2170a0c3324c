"""Figures and pages from saved arrays; nothing here runs a model."""

from bitbyte import face

__getattr__ = face(
    __name__,
    {
        "plots.style": "png_bytes save",
        "plots.figures": (
            "bpb_by_position bpb_table_figure byte_histogram byte_laws ternary_histogram "
            "training_curve"
        ),
    },
)
