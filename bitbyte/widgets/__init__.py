"""The interactive widgets for notebooks.

    from bitbyte.widgets import Sampler
    Sampler().box

`Sampler` writes with a model, `Lens` shows what a model expected at every byte, `Infiller` fills
holes, `TrainingMonitor` follows runs, `launch` starts one in its own process, `GridView` shows how
far a grid is; `ByteView` is the view of bytes in all of them.  Each can be driven from code without
a browser.

Needs the extra: pip install "bitbyte[workbench]".
"""

from bitbyte import face

__getattr__ = face(
    __name__,
    {
        "config": "TrainConfig",
        "widgets.byteview": "ByteView",
        "widgets.gridview": "GridView",
        "widgets.infiller": "Infiller",
        "widgets.lens": "Lens",
        "widgets.monitor": "TrainingMonitor launch",
        "widgets.sampler": "Sampler",
    },
)
