"""Captions to features: the frozen T5 encoder that LlamaGen was trained with, one for all models of a process."""

from __future__ import annotations

import html
import re
from functools import lru_cache
from pathlib import Path
from typing import Any
from urllib.parse import unquote_plus
from weakref import WeakValueDictionary

import torch
from torch import Tensor

from stage_ray.errors import ConfigError
from stage_ray.pretrained import check_finite, local_checkpoint

KEPT = 512  # captions whose features are kept: those of a step, which every pass of an update reads
CLEANED = [
    (re.compile(pattern), new)
    for pattern, new in (
        (r"https?:\S+|www\.\S+|@\w+", ""),
        (r"<[^<>]*>", " "),  # markup
        (r"[\u31c0-\u4dff\u4e00-\u9fff]+", ""),
        (r"[\u058a\u05be\u2010-\u2015\u2e3a\u2e3b\u301c\u3030\ufe58\ufe63\uff0d]+", "-"),
        (r"[`´«»“”¨]", '"'),
        (r"[‘’]", "'"),
        (r"[#®•©™&@·º½¾¿¡§~()\[\]{}|\\/*]+|\.{2,}", " "),
        (r"(\D[,.])(?=\w)", r"\1 "),
        (r"\s+", " "),
    )
]
"""What changes a plain caption in the clean-up that LlamaGen's captions went through, in its order.

Left out are its rules against what crawled captions hold beside words: sizes, numbers of articles, names of files.
"""
ENDS = re.compile(r"^['_,\-:;]|['_,\-:+]$")
_LOADED: WeakValueDictionary[tuple[Path, torch.device | None], TextEncoder] = WeakValueDictionary()


class TextEncoder:
    """A T5 encoder and its tokenizer. Of a device that is None there is the tokenizer alone.

    Weights are read when the first features are asked for: float32 on a CPU, bfloat16 on a GPU, as LlamaGen's own code.
    """

    def __init__(self, location: Path, device: torch.device | None) -> None:
        from transformers import AutoTokenizer  # late: it takes seconds

        try:
            self._tokenizer = AutoTokenizer.from_pretrained(location)
        except (OSError, ValueError, KeyError, TypeError) as error:
            raise ConfigError(f"policy.path: the text encoder {location} has no tokenizer: {error}") from error
        self._location, self._device = location, device
        self._model: Any = None
        self.features = lru_cache(maxsize=KEPT)(self._encode)

    def tokens(self, caption: str) -> tuple[int, ...]:
        """Ids of a caption, the end included."""
        return tuple(int(token) for token in self._tokenizer(clean(caption))["input_ids"])

    @torch.no_grad()
    def _encode(self, tokens: tuple[int, ...]) -> Tensor:
        """The last states of a caption, float [its tokens, width], by itself: no other caption changes them."""
        if self._model is None:
            self._model = self._load()
        ids = torch.tensor([tokens], device=self._device)
        with torch.autocast(ids.device.type, enabled=False):
            return self._model(input_ids=ids).last_hidden_state[0]

    def _load(self) -> Any:
        if self._device is None:
            raise RuntimeError("this process has no text encoder: its codec was loaded without one")
        from transformers import T5EncoderModel

        dtype = torch.float32 if self._device.type == "cpu" else torch.bfloat16
        try:
            model, report = T5EncoderModel.from_pretrained(self._location, dtype=dtype, output_loading_info=True)
        except (OSError, ValueError, RuntimeError) as error:
            raise ConfigError(f"policy.path: the text encoder {self._location} does not load: {error}") from error
        if missing := sorted(report["missing_keys"]):
            raise ConfigError(f"policy.path: the text encoder {self._location} lacks tensor {missing[0]}")
        for name, parameter in model.named_parameters():
            check_finite(name, parameter, self._location)
        return model.to(self._device).requires_grad_(False).eval()


def text_encoder(path: str, device: torch.device | None) -> TextEncoder:
    """The encoder at a directory or hub id, shared by all of this process that asked for it and hold it still.

    Raises:
        ConfigError: it is no T5, or its tokenizer does not load.
    """
    key = (local_checkpoint(path, "t5", "policy.path: config.json's text_encoder"), device)
    found = _LOADED.get(key) or TextEncoder(*key)
    _LOADED[key] = found
    return found


def clean(caption: str) -> str:
    """A caption as LlamaGen's were written for its text encoder: small letters, plain marks, single spaces."""
    text = unquote_plus(caption).strip().lower()
    for pattern, new in CLEANED:
        text = pattern.sub(new, text)
    return ENDS.sub("", html.unescape(text).strip()).strip()
