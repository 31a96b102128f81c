"""The page: layout and events. model.py computes the contents."""

from __future__ import annotations

import math
import os
from pathlib import Path
from typing import Any

import gradio as gr
import numpy as np
import torch
from torch import Tensor

from pecobook.commands.explore import model
from pecobook.commands.explore.model import IndexedTokenizer, Picture, to_array
from pecobook.commands.masked_run import MaskedRun
from pecobook.data.decode import BadImage, decode
from pecobook.data.source import Splits
from pecobook.data.views import center_crop
from pecobook.utils.images import fitted_size, resize, to_float

_HELP = (
    "Drop an image or choose one. The token map has one colour per codeword, and similar codewords have similar "
    "colours. **Click a token** to see other patches with the same codeword."
)
_PRIVATE: dict[str, Any] = {"api_visibility": "private"}


class Page:
    """Handles the events of the page. This object stores no data of visitors: their image is in the state of the page.

    Args:
        indexed: tokenizers with the images of the source.
        runs: pre-trained ViTs by name.
        splits: the source of images.
    """

    def __init__(self, indexed: list[IndexedTokenizer], runs: dict[str, MaskedRun], splits: Splits) -> None:
        self.indexed = {tokenizer.name: tokenizer for tokenizer in indexed}
        self.runs, self.classes = runs, splits.train.classes or ()
        self.source = splits.evaluation
        self.thumbnails = model.thumbnails(self.source)
        sizes = [tokenizer.tokenizer.image_size for tokenizer in indexed] + [run.image_size for run in runs.values()]
        self.largest_side = 2 * max(sizes)

    def blocks(self) -> gr.Blocks:
        """Build the page."""
        names = list(self.indexed)
        with gr.Blocks(title="pecobook explore", analytics_enabled=False, delete_cache=(600, 600)) as blocks:
            image = gr.State(self._held_out_image(0))
            gr.Markdown("# Codewords\n\n" + _HELP)
            with gr.Row():
                with gr.Column(scale=1):
                    upload = gr.File(label="Your image", file_types=["image"], elem_id="upload", height=120)
                    held_out = gr.Gallery(
                        [(thumb, "") for thumb in self.thumbnails.values()], label="Held-out images", columns=3,
                        height=240, allow_preview=False, elem_id="known",
                    )  # fmt: skip
                    tokenizer = gr.Radio(names, value=names[0], label="Tokenizer", visible=len(names) > 1)
                with gr.Column(scale=3), gr.Row():
                    pictures = [_view(label) for label in ("Image", "Token map: click", "Reconstruction", "Error")]
            about = gr.Markdown("", elem_id="about")
            with gr.Row():
                patches = gr.Gallery(label="Patches with this codeword", columns=5, height="auto", elem_id="patches")
                with gr.Column():
                    classes = gr.Dataframe(headers=["class", "patches", "%"], label="Classes", interactive=False)
                    nearest = gr.Gallery(label="Nearest codewords in use", columns=4, height="auto", elem_id="near")
                positions = _view("Positions: white is the most frequent one")
            inputs, outputs = [image, tokenizer], [*pictures, about]
            uploaded = upload.upload(self.read_upload, [upload], [image], **_PRIVATE)
            uploaded.success(self.show_image, inputs, outputs, **_PRIVATE)
            uploaded.then(lambda: None, None, [upload], **_PRIVATE)  # so that another image can be dropped
            selected = held_out.select(self.read_held_out, None, [image], **_PRIVATE)
            selected.success(self.show_image, inputs, outputs, **_PRIVATE)
            tokenizer.change(self.show_image, inputs, outputs, **_PRIVATE)
            blocks.load(self.show_image, inputs, outputs, **_PRIVATE)
            pictures[1].select(self.show_codeword, inputs, [about, patches, classes, nearest, positions], **_PRIVATE)
            if len(names) > 1:
                self._comparison(names, image)
            if self.runs:
                self._masked_prediction(image)
        return blocks

    def _comparison(self, names: list[str], image: gr.State) -> None:
        gr.Markdown("## Two tokenizers\n\nMove the slider to compare the reconstructions of two tokenizers.")
        with gr.Row():
            left = gr.Radio(names, value=names[0], label="Left")
            right = gr.Radio(names, value=names[1], label="Right")
            compare = gr.Button("Compare", elem_id="compare")
        slider = gr.ImageSlider(label="Reconstructions", interactive=False, elem_id="slider", format="png")
        compare.click(self.compare, [image, left, right], [slider], **_PRIVATE)

    def _masked_prediction(self, image: gr.State) -> None:
        names = list(self.runs)
        gr.Markdown("## Masked prediction\n\nTake the image, paint over patches, and let the ViT predict them.")
        with gr.Row():
            run = gr.Radio(names, value=names[0], label="ViT", visible=len(names) > 1)
            take = gr.Button("Take the image", elem_id="take")
            predict = gr.Button("Predict", elem_id="ask", variant="primary")
        with gr.Row():
            editor = gr.ImageEditor(
                label="Paint a mask", sources=(), type="numpy", transforms=(), layers=False, elem_id="editor",
                brush=gr.Brush(default_size=40, colors=["#808080"], color_mode="fixed"),
            )  # fmt: skip
            masked, predicted = _view("Masked image"), _view("Prediction")
        result = gr.Markdown("", elem_id="told")
        take.click(self.take_image, [image, run], [editor], **_PRIVATE)
        predict.click(self.predict, [image, run, editor], [masked, predicted, result], **_PRIVATE)

    # ---------------------------------------------------------------------------------------------------------- events

    def read_upload(self, file: str | None) -> Picture:
        """Read an uploaded image of any format that training supports."""
        if file is None:
            raise gr.Error("No image was uploaded.")
        path = Path(file).resolve()
        if not path.is_relative_to(Path(os.environ["GRADIO_TEMP_DIR"]).resolve()):
            raise gr.Error("Only uploaded images can be read.", print_exception=False)
        try:
            image = decode(path.read_bytes(), name=path.name, value_range=self.source.value_range)
            return self._reduced(image)
        except BadImage as error:
            raise gr.Error(f"This image cannot be read: {error}", print_exception=False) from None

    def read_held_out(self, event: gr.SelectData) -> Picture:
        """Read the selected held-out image without a crop, because each tokenizer uses a different crop."""
        return self._held_out_image(int(event.index))

    def _held_out_image(self, position: int) -> Picture:
        """Read the image of a thumbnail."""
        try:
            return self._reduced(self.source.read(list(self.thumbnails)[position]))
        except BadImage as error:
            raise gr.Error(f"This image cannot be read: {error}", print_exception=False) from None

    def _reduced(self, image: Tensor) -> Picture:
        """Reduce a large image (3, H, W) to twice the side that any model reads, since the page keeps it in memory."""
        height, width = image.shape[1:]
        short_side = min(self.largest_side, height, width)
        return to_array(resize(image, *fitted_size(height, width, short_side, math.inf)))

    def show_image(self, image: Picture, name: str) -> tuple[Any, ...]:
        """Return the four pictures and a line of text."""
        encoded = model.encode_image(self.indexed[name], _tensor(image))
        h, w = encoded.codes.shape
        distinct = len(encoded.codes.unique())  # type: ignore[no-untyped-call]
        line = f"{h} x {w} tokens, {distinct} different codewords, PSNR {encoded.psnr:.1f} dB"
        return encoded.original, encoded.tokens, encoded.restored, encoded.error, line

    def show_codeword(self, image: Picture, name: str, event: gr.SelectData) -> tuple[Any, ...]:
        """Return text, patches, classes, nearest codewords and positions of the clicked codeword."""
        indexed = self.indexed[name]
        x, y = event.index
        code = model.code_at(model.encode_image(indexed, _tensor(image)), int(x), int(y))
        info = model.codeword_info(indexed, code, self.classes)
        positions = info.row.positions
        line = (
            f"**Codeword {code}**: {info.row.count} patches in {info.row.images} of {len(indexed.images)} images, "
            f"at {int((positions > 0).sum())} of {positions.size} positions."
        )
        nearest = [(patch, f"codeword {codeword}") for codeword, patch in info.nearest]
        rows = [[name, count, round(share, 1)] for name, count, share in info.classes]
        return line, info.patches, rows, nearest, model.position_picture(positions)

    def compare(self, image: Picture, left: str, right: str) -> tuple[Picture, Picture]:
        """Return the reconstructions of two tokenizers, with equal sizes."""
        pair = [model.encode_image(self.indexed[name], _tensor(image)).restored for name in (left, right)]
        side = max(len(restored) for restored in pair)
        a, b = (to_array(resize(_tensor(restored), side, side)) for restored in pair)
        return a, b

    def take_image(self, image: Picture, name: str) -> dict[str, Any]:
        """Put the ViT's crop of the image into the editor."""
        crop = center_crop(_tensor(image), self.runs[name].image_size)
        return {"background": model.to_picture(to_float(crop)), "layers": [], "composite": None}

    def predict(self, image: Picture, name: str, painting: dict[str, Any] | None) -> tuple[Any, ...]:
        """Predict the painted patches; return the masked image, the prediction and a line of text."""
        run = self.runs[name]
        layers = [layer[..., 3] for layer in (painting or {}).get("layers", []) if layer is not None]
        mask = (
            model.painted_patches(np.max(layers, axis=0), run.grid)
            if layers
            else torch.zeros(run.grid, dtype=torch.bool)
        )
        if not mask.any():
            raise gr.Error("Nothing is painted: take the image, and paint over patches.", print_exception=False)
        if mask.all():
            raise gr.Error("All patches are painted: leave some patches visible.", print_exception=False)
        masked, predicted, accuracy = model.predict(run, _tensor(image), mask)
        line = f"{int(mask.sum())} of {mask.numel()} patches masked, {accuracy:.0f}% of their codes predicted correctly"
        return masked, predicted, line


def _view(label: str) -> gr.Image:
    """Make an image below its title, because a title inside the image would hide tokens."""
    with gr.Column(min_width=160):
        gr.Markdown(f"**{label}**")
        name = label.partition(":")[0].lower().replace(" ", "-")
        return gr.Image(
            label=label, show_label=False, interactive=False, format="png", buttons=["fullscreen"], elem_id=name
        )


def _tensor(image: Picture) -> Tensor:
    """Convert a picture uint8 (H, W, 3) to an image (3, H, W)."""
    return torch.from_numpy(np.ascontiguousarray(image)).permute(2, 0, 1)
