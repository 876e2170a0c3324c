"""Figures and pages from saved arrays; nothing here runs a model."""

from bitbyte import face

__getattr__ = face(
    __name__,
    {
        "plots.style": "COLORS png_bytes save",
        "plots.figures": (
            "bpb_by_position bpb_table_figure byte_histogram byte_probs grid_figure "
            "ternary_histogram training_curve writing_figure"
        ),
    },
    renamed="byte_laws:byte_probs COLOURS:COLORS",
)
