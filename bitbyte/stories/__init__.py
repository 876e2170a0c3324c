"""The built-in corpus: a probabilistic grammar whose entropy is known exactly."""

from bitbyte import face

__getattr__ = face(
    __name__,
    {
        "stories.grammar": "GRAMMAR_HASH SOURCE StoriesModel stories story write_json",
    },
    renamed="StoriesLaw:StoriesModel",
)
