"""The controls of the sampler and their places in a box of 840 px; what they do is in `sampler`.

Heights are fixed, so that nothing jumps while bytes stream in.
"""

import ipywidgets as W

from bitbyte import infill
from bitbyte.byteview import ByteView
from bitbyte.generate import SamplingConfig
from bitbyte.vocab import N_BYTES


def _sized(width: int, height: int | None = None, **options) -> W.Layout:
    return W.Layout(width=f"{width}px", height=height and f"{height}px", **options)


def _slider(kind, name: str, low, high, step, value):
    return kind(
        value=value, min=low, max=high, step=step, description=name,
        style={"description_width": "110px"}, layout=_sized(390),
    )  # fmt: skip


def _button(text: str, name: str, **options) -> W.Button:
    button = W.Button(description=text, layout=_sized(108), **options)
    button.add_class(f"bb-{name}")
    return button


class Controls:
    """Widgets as attributes, all together in ``box``."""

    def __init__(self, prompt: str):
        self.model_choice = W.Dropdown(
            description="model", style={"description_width": "initial"}, layout=_sized(720)
        )
        self.prompt = W.Textarea(
            value=prompt, placeholder="prompt (may be empty)", continuous_update=False,
            layout=_sized(390, 72),
        )  # fmt: skip
        self.temperature = _slider(W.FloatSlider, "temperature", 0, 2, 0.05, 0.8)
        self.top_k = _slider(W.IntSlider, "top-k (0 = off)", 0, N_BYTES, 1, 0)
        self.top_p = _slider(W.FloatSlider, "top-p (1 = off)", 0.05, 1, 0.01, 1.0)
        self.min_p = _slider(W.FloatSlider, "min-p (0 = off)", 0, 0.5, 0.01, 0.0)
        self.repetition_penalty = _slider(W.FloatSlider, "repetition", 1, 2, 0.05, 1.0)
        self.length = _slider(W.IntSlider, "length", 1, 4096, 1, 256)
        self.seed = W.BoundedIntText(
            value=0, min=0, max=2**31 - 1, description="seed",
            style={"description_width": "110px"}, layout=_sized(240),
        )  # fmt: skip
        self.order = W.Dropdown(
            options=infill.ORDERS, description="order",
            style={"description_width": "110px"}, layout=_sized(240),
        )  # fmt: skip
        self.steps = W.BoundedIntText(
            value=0, min=0, max=4096, description="steps",
            style={"description_width": "initial"}, layout=_sized(140),
        )  # fmt: skip
        self.steps.tooltip = "passes of the network a block; 0: one for each byte"
        self.denoising = W.HBox([self.order, self.steps], layout=W.Layout(display="none"))
        self.refresh_button = _button("Refresh", "refresh", tooltip="look for checkpoints again")
        self.seed_button = _button("New seed", "new-seed")
        self.generate_button = _button("Generate", "generate", button_style="primary")
        self.stop_button = _button("Stop", "stop")
        self.continue_button = _button("Continue", "continue")
        self.undo_button = _button("Undo", "undo")
        self.bars = W.HTML(layout=_sized(435, 290, overflow="hidden"))
        self.sentence_line = W.HTML(layout=_sized(435, 60))
        self.status = W.HTML(layout=W.Layout(height="80px", overflow="hidden"))
        self.view = ByteView(height=300)
        self.law_sliders = [
            self.temperature, self.top_k, self.top_p, self.min_p, self.repetition_penalty
        ]  # fmt: skip
        for name in (
            "model_choice", "prompt", "temperature", "top_k", "top_p", "min_p",
            "repetition_penalty", "length", "seed", "order", "steps", "bars",
            "sentence_line", "status",
        ):  # fmt: skip
            getattr(self, name).add_class(f"bb-{name.removesuffix('_line').replace('_', '-')}")
        seed = W.HBox([self.seed, self.seed_button])
        settings = [self.prompt, *self.law_sliders, self.length, seed, self.denoising]
        actions = [self.generate_button, self.stop_button, self.continue_button, self.undo_button]
        rows = [
            W.HBox([self.model_choice, self.refresh_button]),
            W.HBox([W.VBox(settings), W.VBox([self.bars, self.sentence_line])]),
            W.HBox(actions),
            self.status,
            self.view,
        ]
        self.box = W.VBox(rows, layout=W.Layout(max_width="1000px"))
        self.box.add_class("bb-sampler")

    @property
    def config(self) -> SamplingConfig:
        """The settings as the sliders stand."""
        return SamplingConfig(
            temperature=round(self.temperature.value, 4), top_k=self.top_k.value,
            top_p=round(self.top_p.value, 4), min_p=round(self.min_p.value, 4),
            repetition_penalty=round(self.repetition_penalty.value, 4),
            max_new_tokens=self.length.value, seed=self.seed.value,
        )  # fmt: skip

    @property
    def denoise_options(self) -> dict:
        """Order and steps of a diffusion model."""
        return {"order": self.order.value, "steps": self.steps.value or None}

    @property
    def prompt_bytes(self) -> bytes:
        return self.prompt.value.encode("utf-8", "replace")
