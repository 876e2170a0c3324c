"""Papers whose numbers, tables and figures come from records."""

from bitbyte import face

__getattr__ = face(
    __name__,
    {
        "papers.build": "build make numbers_markdown page_images summary_markdown",
        "papers.source": "find_papers read_paper",
    },
)
