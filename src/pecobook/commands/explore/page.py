"""The page: what is shown where, and what a click asks. All answers come from model.py."""

from __future__ import annotations

import os
from pathlib import Path
from typing import Any

import gradio as gr
import numpy as np
import torch
from torch import Tensor

from pecobook.commands.explore import model
from pecobook.commands.explore.model import Indexed, Picture
from pecobook.commands.masked_run import MaskedRun
from pecobook.data.decode import BadImage, decode
from pecobook.data.source import Splits
from pecobook.data.views import center_crop
from pecobook.utils.images import resize, to_float

_HELP = (
    "Drop an image or choose one. The token map has a colour for each codeword, alike where codewords are. **Click a "
    "token** to see who else has its codeword."
)
_PRIVATE: dict[str, Any] = {"api_visibility": "private"}


class Page:
    """Answers events; holds nothing of a visitor, whose image is in the page's state.

    Args:
        indexed: tokenizers with the images of the source.
        runs: pre-trained ViTs by name.
        splits: the source.
    """

    def __init__(self, indexed: list[Indexed], runs: dict[str, MaskedRun], splits: Splits) -> None:
        self.indexed = {one.name: one for one in indexed}
        self.runs, self.classes = runs, splits.train.classes or ()
        self.source = splits.evaluation
        self.known = model.thumbnails(self.source)

    def blocks(self) -> gr.Blocks:
        """The page."""
        names = list(self.indexed)
        with gr.Blocks(title="pecobook explore", analytics_enabled=False, delete_cache=(600, 600)) as blocks:
            image = gr.State(self._original(0))
            gr.Markdown("# Codewords\n\n" + _HELP)
            with gr.Row():
                with gr.Column(scale=1):
                    upload = gr.File(label="Your image", file_types=["image"], elem_id="upload", height=120)
                    known = gr.Gallery(
                        [(thumb, "") for thumb in self.known.values()], label="Held-out images", columns=3,
                        height=240, allow_preview=False, elem_id="known",
                    )  # fmt: skip
                    tokenizer = gr.Radio(names, value=names[0], label="Tokenizer", visible=len(names) > 1)
                with gr.Column(scale=3), gr.Row():
                    shown = [_view(label) for label in ("Image", "Token map: click", "From tokens alone", "Error")]
            about = gr.Markdown("", elem_id="about")
            with gr.Row():
                patches = gr.Gallery(label="Patches with this codeword", columns=5, height="auto", elem_id="patches")
                with gr.Column():
                    classes = gr.Dataframe(headers=["class", "patches", "%"], label="Classes", interactive=False)
                    near = gr.Gallery(label="Nearest codewords in use", columns=4, height="auto", elem_id="near")
            outputs = [*shown, about]
            given = upload.upload(self.uploaded, [upload], [image], **_PRIVATE)
            given.success(self.look, [image, tokenizer], outputs, **_PRIVATE)
            given.then(lambda: None, None, [upload], **_PRIVATE)  # so that another can be dropped
            known.select(self.chosen, None, [image], **_PRIVATE).success(
                self.look, [image, tokenizer], outputs, **_PRIVATE
            )
            tokenizer.change(self.look, [image, tokenizer], outputs, **_PRIVATE)
            blocks.load(self.look, [image, tokenizer], outputs, **_PRIVATE)
            shown[1].select(self.clicked, [image, tokenizer], [about, patches, classes, near], **_PRIVATE)
            if len(names) > 1:
                self._two(names, image)
            if self.runs:
                self._masks(image)
        return blocks

    def _two(self, names: list[str], image: gr.State) -> None:
        gr.Markdown("## Two tokenizers\n\nSlide between what each keeps of the image.")
        with gr.Row():
            left = gr.Radio(names, value=names[0], label="Left")
            right = gr.Radio(names, value=names[1], label="Right")
            compare = gr.Button("Compare", elem_id="compare")
        slider = gr.ImageSlider(label="From tokens alone", interactive=False, elem_id="slider", format="png")
        compare.click(self.both, [image, left, right], [slider], **_PRIVATE)

    def _masks(self, image: gr.State) -> None:
        names = list(self.runs)
        gr.Markdown("## Behind a mask\n\nTake the image, paint over what to hide, and ask the pre-trained ViT.")
        with gr.Row():
            run = gr.Radio(names, value=names[0], label="ViT", visible=len(names) > 1)
            take = gr.Button("Take the image", elem_id="take")
            ask = gr.Button("Predict", elem_id="ask", variant="primary")
        with gr.Row():
            editor = gr.ImageEditor(
                label="Paint a mask", sources=(), type="numpy", transforms=(), layers=False, elem_id="editor",
                brush=gr.Brush(default_size=40, colors=["#808080"], color_mode="fixed"),
            )  # fmt: skip
            hidden, predicted = _view("What it sees"), _view("What it believes")
        told = gr.Markdown("", elem_id="told")
        take.click(self.taken, [image, run], [editor], **_PRIVATE)
        ask.click(self.predicted, [image, run, editor], [hidden, predicted, told], **_PRIVATE)

    # ---------------------------------------------------------------------------------------------------------- events

    def uploaded(self, file: str | None) -> Picture:
        """An image that was dropped: any kind that training reads."""
        if file is None:
            raise gr.Error("No image was given.")
        path = Path(file).resolve()
        if not path.is_relative_to(Path(os.environ["GRADIO_TEMP_DIR"]).resolve()):
            raise gr.Error("Only images that were uploaded are read.", print_exception=False)
        try:
            return _array(decode(path.read_bytes(), name=path.name))
        except BadImage as error:
            raise gr.Error(f"This image cannot be read: {error}", print_exception=False) from None

    def chosen(self, event: gr.SelectData) -> Picture:
        """A held-out image as the source has it: each tokenizer makes its own crop of it."""
        return self._original(int(event.index))

    def _original(self, place: int) -> Picture:
        """The image behind a thumbnail."""
        try:
            return _array(self.source.read(list(self.known)[place]))
        except BadImage as error:
            raise gr.Error(f"This image cannot be read: {error}", print_exception=False) from None

    def look(self, image: Picture, name: str) -> tuple[Any, ...]:
        """The four pictures, and a line."""
        seen = model.see(self.indexed[name], _tensor(image))
        h, w = seen.codes.shape
        line = f"{h} x {w} tokens, {len(seen.codes.unique())} different codewords, PSNR {seen.psnr:.1f} dB"  # type: ignore[no-untyped-call]
        return seen.original, seen.tokens, seen.restored, seen.error, line

    def clicked(self, image: Picture, name: str, event: gr.SelectData) -> tuple[Any, ...]:
        """All about the codeword that was clicked."""
        one = self.indexed[name]
        x, y = event.index
        code = model.code_at(model.see(one, _tensor(image)), int(x), int(y))
        told = model.about(one, code, self.classes)
        line = f"**Codeword {told.number}**: {told.count} patches in {told.images} of {len(one.images)} images."
        near = [(patch, f"codeword {other}") for other, patch in told.near]
        rows = [[name, count, round(share, 1)] for name, count, share in told.classes]
        return line, told.patches, rows, near

    def both(self, image: Picture, left: str, right: str) -> tuple[Picture, Picture]:
        """Reconstructions of two tokenizers, at one size."""
        pair = [model.see(self.indexed[name], _tensor(image)).restored for name in (left, right)]
        side = max(len(one) for one in pair)
        a, b = (_array(resize(_tensor(one), side, side)) for one in pair)
        return a, b

    def taken(self, image: Picture, name: str) -> dict[str, Any]:
        """The image under the brush, as the ViT sees it."""
        crop = center_crop(_tensor(image), self.runs[name].image_size)
        return {"background": model.picture(to_float(crop)), "layers": [], "composite": None}

    def predicted(self, image: Picture, name: str, painting: dict[str, Any] | None) -> tuple[Any, ...]:
        """What the ViT believes behind the strokes."""
        run = self.runs[name]
        layers = [layer[..., 3] for layer in (painting or {}).get("layers", []) if layer is not None]
        mask = model.painted(np.max(layers, axis=0), run.grid) if layers else torch.zeros(run.grid, dtype=torch.bool)
        if not mask.any():
            raise gr.Error("Nothing is painted: take the image, and paint over what to hide.", print_exception=False)
        if mask.all():
            raise gr.Error("All of it is painted: leave the ViT something to see.", print_exception=False)
        hidden, believed, right = model.predict(run, _tensor(image), mask)
        return (
            hidden,
            believed,
            f"{int(mask.sum())} of {mask.numel()} patches hidden, {right:.0f}% of their codes right",
        )


def _view(label: str) -> gr.Image:
    """A picture under its title; a title within would hide tokens."""
    with gr.Column(min_width=160):
        gr.Markdown(f"**{label}**")
        name = label.partition(":")[0].lower().replace(" ", "-")
        return gr.Image(
            label=label, show_label=False, interactive=False, format="png", buttons=["fullscreen"], elem_id=name
        )


def _array(image: Tensor) -> Picture:
    """uint8 (3, H, W) to (H, W, 3)."""
    return np.ascontiguousarray(image.permute(1, 2, 0).numpy())


def _tensor(image: Picture) -> Tensor:
    """uint8 (H, W, 3) to (3, H, W)."""
    return torch.from_numpy(np.ascontiguousarray(image)).permute(2, 0, 1)
