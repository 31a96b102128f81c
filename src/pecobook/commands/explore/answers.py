"""The server's answer to each URL of the page, without a network."""

from __future__ import annotations

import base64
import dataclasses
import json
import math
import secrets
import threading
from collections import OrderedDict
from collections.abc import Callable, Mapping
from functools import lru_cache
from importlib.resources import files
from pathlib import Path

import torch
from torch import Tensor

from pecobook.analysis.atlas import Atlas, as_json, sprite_jpeg
from pecobook.commands.explore import model
from pecobook.commands.explore.model import EncodedImage, IndexedTokenizer, Json
from pecobook.commands.masked_run import MaskedRun
from pecobook.data.decode import BadImage, decode
from pecobook.data.masking import blockwise_mask
from pecobook.data.sampler import fixed_permutation
from pecobook.data.source import ImageSource
from pecobook.data.views import center_crop
from pecobook.utils.images import encode_picture, to_pillow

THUMBNAIL = 96
STRIP = 24
"""Number of held-out images that the page offers at a time."""
UPLOADS = 64
"""Number of uploaded images that are kept; the oldest is dropped first."""
_ENCODED = 32  # images whose pictures are kept, of all tokenizers together
_TYPES = {".html": "text/html; charset=utf-8", ".css": "text/css; charset=utf-8", ".js": "text/javascript"}
_STATIC = Path(__file__).parent / "static"
_ATLAS = Path(str(files("pecobook.analysis"))) / "templates" / "atlas.js"


class Refused(Exception):  # noqa: N818 (an HTTP response with a sentence for the visitor)
    """A request that cannot be answered; the text says why."""

    def __init__(self, text: str, status: int = 400) -> None:
        super().__init__(text)
        self.status = status


@dataclasses.dataclass(frozen=True)
class Answer:
    """The body of an answer."""

    body: bytes
    content_type: str = "application/json"
    lasting: bool = False
    """Whether the browser may keep it as long as this server runs."""


class Images:
    """Held-out images by number, and uploaded images by a random name; the latter are kept only in memory.

    Args:
        source: the held-out images.
        sizes: sides of the required central crops, in pixels.
    """

    def __init__(self, source: ImageSource, sizes: set[int]) -> None:
        self.source, self.sizes = source, sizes
        self._uploads: OrderedDict[str, dict[int, Tensor]] = OrderedDict()
        self._lock = threading.Lock()

    def crop(self, name: str, size: int) -> Tensor:
        """Return the central crop of an image, uint8 (3, size, size), as the index reads it. Raises Refused."""
        if size not in self.sizes:
            raise Refused(f"No model of this page reads images of {size} pixels.", 404)
        number = self.number(name)
        if number is None:
            return self._uploads[name][size]
        try:
            return center_crop(self.source.read(number, 4 * size), size)
        except BadImage as error:
            raise Refused(f"This image cannot be read: {error}") from None

    def number(self, name: str) -> int | None:
        """Return the number of a held-out image, None for an uploaded one. Raises Refused if there is neither."""
        if name in self._uploads:
            return None
        if name.isdecimal() and len(name) < 19 and int(name) < len(self.source):
            return int(name)
        if name.isdecimal():
            raise Refused(f"There is no image {name}: the source holds out {len(self.source)}, counted from 0.", 404)
        raise Refused("This uploaded image is gone: upload it again.", 404)

    def add(self, data: bytes) -> str:
        """Decode an image of any format that training reads, keep its crops, and return its name. Raises Refused."""
        try:
            crops = {
                size: center_crop(decode(data, value_range=self.source.value_range, shortest=4 * size), size).clone()
                for size in self.sizes
            }
        except BadImage as error:
            raise Refused(f"This image cannot be read: {error.reason}.") from None
        name = f"upload-{secrets.token_urlsafe(12)}"
        with self._lock:
            self._uploads[name] = crops
            while len(self._uploads) > UPLOADS:
                self._uploads.popitem(last=False)
        return name

    def describe(self, name: str) -> Json:
        """Return the name and the class of an image."""
        number = self.number(name)
        if number is None:
            return {"name": "your image", "class": ""}
        label = "" if self.source.labels is None else (self.source.classes or ())[self.source.labels[number]]
        return {"name": self.source.identify(number), "class": label}


class Answers:
    """Answers requests by path and query. Models compute one request at a time."""

    def __init__(
        self,
        tokenizers: list[IndexedTokenizer],
        runs: Mapping[str, tuple[MaskedRun, str]],
        source: ImageSource,
        upload_mb: int,
    ) -> None:
        self.tokenizers = {tokenizer.name: tokenizer for tokenizer in tokenizers}
        self.runs, self.upload_mb = runs, upload_mb
        sizes = {tokenizer.tokenizer.image_size for tokenizer in tokenizers}
        self.images = Images(source, {*sizes, *(run.image_size for run, _ in runs.values()), THUMBNAIL})
        self._session = secrets.token_urlsafe(6)
        self._lock = threading.Lock()
        self._encoded = lru_cache(_ENCODED)(self._encode)
        self._made_atlas = lru_cache(lambda name: model.atlas(self.tokenizers[name]))
        self._known_tiles: dict[tuple[str, int], Tensor] = {}
        self._files = {f"/{file.name}": file for file in [*_STATIC.iterdir(), _ATLAS]}
        self._files["/"] = _STATIC / "page.html"
        self._routes: dict[str, Callable[[dict[str, str]], Json | Answer]] = {
            "/api/setup": self._setup,
            "/api/images": self._strip,
            "/api/image": self._image,
            "/api/codewords": self._codewords,
            "/api/codeword": self._codeword,
            "/api/mask": self._mask,
            "/api/predict": self._predict,
            "/picture": self._picture,
            "/tiles": self._tiles,
            "/api/atlas": lambda query: as_json(self._atlas(self._tokenizer(query).name)),
            "/atlas": lambda query: Answer(
                sprite_jpeg(self._atlas(self._tokenizer(query).name)), "image/jpeg", lasting=True
            ),
        }

    def get(self, path: str, query: dict[str, str]) -> Answer:
        """Return the answer to a request. Raises Refused."""
        if path in self._files:
            return Answer(self._files[path].read_bytes(), _TYPES[self._files[path].suffix])
        if path not in self._routes:
            raise Refused("There is no such page.", 404)
        value = self._routes[path](query)
        return value if isinstance(value, Answer) else Answer(json.dumps(value).encode())

    def upload(self, data: bytes) -> Answer:
        """Store an uploaded image and return its name. Raises Refused."""
        return Answer(json.dumps({"image": self.images.add(data)}).encode())

    # -------------------------------------------------------------------------------------------------------- answers

    def _setup(self, query: dict[str, str]) -> Json:  # noqa: ARG002
        return {
            "session": self._session,
            "uploadMb": self.upload_mb,
            "thumbnail": THUMBNAIL,
            "sorts": list(model.SORTS),
            "tokenizers": [
                {
                    "name": name,
                    "codewords": len(one.counts),
                    "used": int((one.counts > 0).sum()),
                    "grid": one.found.grid,
                    "size": one.tokenizer.image_size,
                    "images": one.found.num_images,
                    "labelled": one.labels is not None,
                    "position": [round(100 * share, 1) for share in (one.position.share, one.position.null_share)],
                }
                for name, one in self.tokenizers.items()
            ],
            "runs": [
                {"name": name, "tokenizer": tokenizer, "grid": run.grid, "size": run.image_size}
                for name, (run, tokenizer) in self.runs.items()
            ],
        }

    def _strip(self, query: dict[str, str]) -> Json:
        """Return the next `STRIP` readable held-out images in a fixed random order."""
        rows = next(iter(self.tokenizers.values())).rows
        pages = math.ceil(len(rows) / STRIP)
        first = _number(query, "page", 0, 10**9) % pages * STRIP
        chosen = [
            int(rows[fixed_permutation(place, len(rows))]) for place in range(first, min(first + STRIP, len(rows)))
        ]
        return {
            "pages": pages,
            "images": [{"image": str(image), **self.images.describe(str(image))} for image in chosen],
        }

    def _image(self, query: dict[str, str]) -> Json:
        tokenizer, name = self._tokenizer(query), _text(query, "image")
        with self._lock:
            encoded = self._encoded(tokenizer.name, name)
        return {**self.images.describe(name), **model.image_values(tokenizer, encoded)}

    def _codewords(self, query: dict[str, str]) -> Json:
        sort = _text(query, "sort")
        if sort not in model.SORTS:
            raise Refused(f"Codewords are sorted by {', '.join(model.SORTS)}, not by '{sort}'.")
        return model.codeword_list(self._tokenizer(query), sort, _number(query, "page", 1, 10**9))

    def _codeword(self, query: dict[str, str]) -> Json:
        tokenizer = self._tokenizer(query)
        return model.codeword_values(tokenizer, _codeword(tokenizer, _text(query, "codeword")))

    def _mask(self, query: dict[str, str]) -> Json:
        """Return a mask like those the ViT was trained with, as text."""
        run, _ = self._run(query)
        generator = torch.Generator().manual_seed(_number(query, "seed", 0, 2**31))
        num_masked = min(run.config.mask.num_masked, run.grid[0] * run.grid[1] - 1)
        min_block = min(run.config.mask.min_block, num_masked)
        mask = blockwise_mask(run.grid, num_masked=num_masked, min_block=min_block, generator=generator)
        return {"mask": "".join("1" if bit else "0" for bit in mask.flatten().tolist())}

    def _predict(self, query: dict[str, str]) -> Json:
        (run, name), image = self._run(query), _text(query, "image")
        mask, tokenizer = _mask_of(_text(query, "mask"), run.grid), self.tokenizers[name]
        pixels = self.images.crop(image, run.image_size)
        with self._lock:
            prediction = model.predict(run, pixels, mask)
        chance = model.chance_values(tokenizer, prediction.codes, mask, self.images.number(image))
        picture = base64.b64encode(png(prediction.picture)).decode()
        values = model.prediction_values(prediction, mask)
        return {**values, "chance": chance, "picture": f"data:image/png;base64,{picture}"}

    def _picture(self, query: dict[str, str]) -> Answer:
        """Return an image's crop, its reconstruction or its error."""
        name, kind = _text(query, "image"), query.get("kind", "original")
        lasting = self.images.number(name) is not None
        if kind == "original":
            return Answer(png(self.images.crop(name, _number(query, "size", 1, 10**5))), "image/png", lasting)
        if kind not in ("restored", "error"):
            raise Refused("There is no such picture.", 404)
        with self._lock:
            encoded = self._encoded(self._tokenizer(query).name, name)
        return Answer(png(getattr(encoded, kind)), "image/png", lasting)

    def _tiles(self, query: dict[str, str]) -> Answer:
        """Return the tiles of codewords, side by side in one picture."""
        tokenizer = self._tokenizer(query)
        words = _text(query, "codewords").split(",")
        if len(words) > model.PAGE:
            raise Refused(f"At most {model.PAGE} codewords are decoded at a time.")
        codes = [_codeword(tokenizer, word) for word in words]
        with self._lock:
            new = [code for code in dict.fromkeys(codes) if (tokenizer.name, code) not in self._known_tiles]
            if new:
                tiles = model.tiles(tokenizer, new)
                self._known_tiles.update({(tokenizer.name, code): tile for code, tile in zip(new, tiles, strict=True)})
            patches = [self._known_tiles[tokenizer.name, code] for code in codes]
        return Answer(png(torch.cat(patches, dim=2)), "image/png", lasting=True)

    # -------------------------------------------------------------------------------------------------------- reading

    def _atlas(self, tokenizer: str) -> Atlas:
        with self._lock:
            return self._made_atlas(tokenizer)

    def _encode(self, tokenizer: str, image: str) -> EncodedImage:
        network = self.tokenizers[tokenizer].tokenizer
        return model.encode_image(network, self.images.crop(image, network.image_size))

    def _tokenizer(self, query: dict[str, str]) -> IndexedTokenizer:
        name = _text(query, "tokenizer")
        if name not in self.tokenizers:
            raise Refused(f"There is no tokenizer '{name}' here: {', '.join(self.tokenizers)}.", 404)
        return self.tokenizers[name]

    def _run(self, query: dict[str, str]) -> tuple[MaskedRun, str]:
        name = _text(query, "run")
        if name not in self.runs:
            raise Refused(f"There is no ViT '{name}' here.", 404)
        return self.runs[name]


def _text(query: dict[str, str], key: str) -> str:
    if not query.get(key):
        raise Refused(f"The address lacks '{key}'.")
    return query[key]


def _number(query: dict[str, str], key: str, low: int, high: int) -> int:
    text = _text(query, key)
    if not (text.isascii() and text.isdecimal() and len(text) < 19 and low <= int(text) <= high):
        raise Refused(f"'{key}' must be a whole number from {low}.")
    return int(text)


def _codeword(tokenizer: IndexedTokenizer, text: str) -> int:
    last = len(tokenizer.counts) - 1
    if not (text.isascii() and text.isdecimal() and len(text) < 19 and int(text) <= last):
        raise Refused(f"The codewords of {tokenizer.name} are numbered from 0 to {last}.", 404)
    return int(text)


def _mask_of(text: str, grid: tuple[int, int]) -> Tensor:
    """Read a mask, one digit per patch: 1 for a masked one. Raises Refused."""
    if len(text) != grid[0] * grid[1] or set(text) - {"0", "1"}:
        raise Refused(f"The mask must have {grid[0]} x {grid[1]} digits, 0 or 1.")
    if "1" not in text:
        raise Refused("Nothing is hidden: paint over patches.")
    if "0" not in text:
        raise Refused("All patches are hidden: leave some visible.")
    return torch.tensor([digit == "1" for digit in text]).view(grid)


def png(picture: Tensor) -> bytes:
    """Encode a picture, uint8 (3, H, W), as PNG."""
    return encode_picture(to_pillow(picture), "PNG", compress_level=1)
