"""What a notebook shows and people touch, in one place.

    from bitbyte.widgets import Sampler
    Sampler().box

`Sampler` writes with a model, `Lens` shows what a model expected at every byte, `Infiller` fills
holes, `TrainingMonitor` follows runs, `launch` starts one in a process of its own; `ByteView` is
the view of bytes in all of them.  Each can be driven from code without a browser.

Needs the extra: pip install "bitbyte[workbench]".
"""

from bitbyte.byteview import ByteView
from bitbyte.config import TrainConfig
from bitbyte.infiller import Infiller
from bitbyte.lens import Lens
from bitbyte.monitor import TrainingMonitor, launch
from bitbyte.sampler import Sampler

__all__ = [
    "ByteView", "Infiller", "Lens", "Sampler", "TrainConfig", "TrainingMonitor", "launch",
]  # fmt: skip
