"""Tokens of pictures, to be searched by neighbourhood: for the token of a patch, which tokens stood beside like ones?

A file holds the pictures' tokens and the codebook that gives tokens their distance. `stage-ray index` writes it.
"""

from __future__ import annotations

from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from functools import cached_property, lru_cache
from pathlib import Path
from typing import Any

import numpy as np
import torch
from safetensors import SafetensorError, safe_open
from safetensors.torch import save_file
from torch import Tensor

from stage_ray.config.paths import resolve_path
from stage_ray.errors import ConfigError
from stage_ray.files import digest, sync_path
from stage_ray.registry import require_extra

FORMAT = "stage_ray patch index 1"
EXTRA = ("retrieval", "faiss")  # the extra and what it brings; an exact index needs neither
CONTEXT = 4  # neighbours of a patch that come before it and touch it: upper left, upper, upper right, left
FLOATS_AT_ONCE = 2**24  # made for some queries at a time: 64 MiB
SUBVECTORS, BITS = 8, 8  # of the product quantiser, as published: 8 bytes a patch
LISTS, PATCHES_A_LIST = 80_000, 100  # inverted lists as published, fewer where a list would have fewer patches
ROTATIONS = 50  # rounds in which OPQ turns the vectors so that their quantiser loses least
FEWEST = 39 * 2**BITS  # patches from which faiss trains a quantiser without a warning


@dataclass(frozen=True)
class PatchIndex:
    """Pictures as tokens, and which of their patches have neighbours like those of a patch that is drawn.

    Only patches with all four neighbours count: none of the first row, none at the left and right edge. The distance
    of two neighbourhoods is the squared Euclidean distance of their codebook vectors, one after the other.

    Attributes:
        tokens: int32 [P, rows, columns], of P pictures.
        codebook: float32 [V, D], as the image decoder gets its vectors.
        lists: faiss' index over the neighbourhoods (OPQ, inverted lists, product quantiser); None: all are compared.
    """

    tokens: Tensor
    codebook: Tensor
    lists: Any = None

    @property
    def grid(self) -> tuple[int, int]:
        """Rows and columns of a picture."""
        return self.tokens.shape[1], self.tokens.shape[2]

    @cached_property
    def codes(self) -> Tensor:
        """The tokens of the N patches, int64 [N]."""
        return self.tokens[:, 1:, 1:-1].flatten().long()

    @cached_property
    def contexts(self) -> Tensor:
        """Their neighbours, int64 [N, 4]."""
        above, left = self.tokens[:, :-1], self.tokens[:, 1:, :-2]
        parts = (above[:, :, :-2], above[:, :, 1:-1], above[:, :, 2:], left)
        return torch.stack([part.flatten() for part in parts], dim=1).long()

    def nearest(self, queries: Tensor, k: int, probes: int) -> Tensor:
        """How near the nearest patch with each token is, among the ``k`` nearest of all: float32 [B, V].

        Infinite for tokens that none of them has. Each row depends on its query alone; patches as far away as the last
        of the ``k`` count too.

        Args:
            queries: neighbours, int64 [B, 4].
            probes: inverted lists that are searched.
        """
        size, width = self.codebook.shape
        compared = k if self.lists is not None else len(self.codes)
        found = [queries.new_empty((0, size), dtype=torch.float32)]
        for chunk in queries.split(max(1, FLOATS_AT_ONCE // max(compared, CONTEXT * size * width))):
            # To every code from each neighbour: a neighbourhood's distance is the sum of four of these.
            table = (self.codebook[chunk].unsqueeze(2) - self.codebook).square().sum(dim=-1)  # [b, 4, V]
            far, codes, last = self._compare(chunk, table, k, probes)
            nowhere = torch.full((len(chunk), size), torch.inf, device=queries.device)
            nearest = nowhere.scatter_reduce(1, codes, far, "amin")
            found.append(nearest.masked_fill(nearest > last, torch.inf))
        return torch.cat(found)

    def _compare(self, queries: Tensor, table: Tensor, k: int, probes: int) -> tuple[Tensor, Tensor, Tensor]:
        """Distances and the patches' tokens, [b, n] both, and the distance up to which a patch counts, [b, 1]."""
        if self.lists is None:
            far = torch.zeros(len(table), len(self.codes), device=table.device)
            for i, codes in enumerate(self.contexts.T):
                far += table[:, i].index_select(1, codes)
            return far, self.codes.expand(len(queries), -1), kth_smallest(far, min(k, far.shape[1]))
        patches = self._search(queries, k, probes)
        known = patches.clamp(min=0)  # -1: the lists hold no more
        far = table.gather(2, self.contexts[known].movedim(-1, 1)).sum(dim=1)
        far = far.masked_fill(patches < 0, torch.inf)
        return far, self.codes[known], far.new_full((len(far), 1), torch.inf)

    def _search(self, queries: Tensor, k: int, probes: int) -> Tensor:
        """Numbers of patches by faiss, int64 [b, k]. Query by query: in a batch, products round otherwise."""
        import faiss

        vectors = self.codebook[queries].flatten(1).cpu().numpy()
        params = faiss.SearchParametersPreTransform(index_params=faiss.SearchParametersIVF(nprobe=probes))
        with ThreadPoolExecutor() as threads:
            found = threads.map(lambda row: self.lists.search(row[None], k, params=params)[1], vectors)
            return torch.cat([torch.from_numpy(row) for row in found]).to(queries.device)

    def vectors(self) -> Iterator[Tensor]:
        """The neighbourhoods as vectors, float32 [some, 4 D], some at a time."""
        for chunk in self.contexts.split(max(1, FLOATS_AT_ONCE // (CONTEXT * self.codebook.shape[1]))):
            yield self.codebook[chunk].flatten(1)

    def with_lists(self) -> PatchIndex:
        """The same with faiss' index over it, as the paper has it; trained on some of the patches.

        Raises:
            ConfigError: faiss is not installed, or there are too few patches to train on.
        """
        require_extra(*EXTRA)
        import faiss

        count, width = len(self.codes), CONTEXT * self.codebook.shape[1]
        if count < FEWEST:
            raise ConfigError(
                f"--kind ivfpq needs {FEWEST} patches to train on, and here are {count}; use --kind exact"
            )
        subvectors = SUBVECTORS if width % SUBVECTORS == 0 else CONTEXT
        lists = min(LISTS, max(1, count // PATCHES_A_LIST))
        turned, own = faiss.OPQMatrix(width, subvectors), faiss.ProductQuantizer(width, subvectors, BITS)
        turned.niter, turned.pq = ROTATIONS, own
        quantiser = faiss.IndexFlatL2(width)
        index = faiss.IndexPreTransform(turned, faiss.IndexIVFPQ(quantiser, width, lists, subvectors, BITS))
        generator = torch.Generator().manual_seed(0)
        some = torch.randperm(count, generator=generator)[: max(FEWEST, lists * PATCHES_A_LIST)]
        index.train(self.codebook[self.contexts[some]].flatten(1).numpy())
        turned.pq = None  # only for its training
        for vectors in self.vectors():
            index.add(vectors.numpy())
        return PatchIndex(self.tokens, self.codebook, index)

    def save(self, path: Path) -> None:
        """Write the file, whole or not at all, and beside it that of faiss, if there is one, which it names."""
        path.parent.mkdir(parents=True, exist_ok=True)
        about = {"format": FORMAT, "faiss": ""}
        if self.lists is not None:
            import faiss

            lists = path.with_suffix(".faiss")
            scratch = lists.with_name(lists.name + ".tmp")
            faiss.write_index(self.lists, str(scratch))
            sync_path(scratch)
            scratch.replace(lists)
            about["faiss"] = digest(lists)
        scratch = path.with_name(path.name + ".tmp")
        tensors = {"tokens": self.tokens.int().contiguous(), "codebook": self.codebook.float().contiguous()}
        save_file(tensors, scratch, metadata=about)
        sync_path(scratch)
        scratch.replace(path)

    def to(self, device: torch.device) -> PatchIndex:
        """The same on a device; faiss stays on the CPU."""
        return PatchIndex(self.tokens.to(device), self.codebook.to(device), self.lists)


def kth_smallest(values: Tensor, k: int) -> Tensor:
    """The ``k``-th smallest of each row, [B, n] -> [B, 1]. On a CPU by NumPy: `topk` takes eight times as long."""
    if values.device.type != "cpu":
        return values.topk(k, largest=False).values[:, -1:]
    return torch.from_numpy(np.partition(values.numpy(), k - 1, axis=1)[:, k - 1 : k])


def load_index(path: str, key: str) -> PatchIndex:
    """Read what `PatchIndex.save` wrote, on the CPU; ``key`` is the config's, for messages.

    Raises:
        ConfigError: it is missing, damaged or something else; or it needs faiss, which is not installed.
    """
    try:
        file = resolve_path(path)
        with safe_open(file, framework="pt") as opened:
            about = opened.metadata() or {}
            if about.get("format") != FORMAT:
                raise ConfigError(f"is no {FORMAT}")
            index = PatchIndex(opened.get_tensor("tokens"), opened.get_tensor("codebook"))
        if not len(index.codes):
            raise ConfigError("holds no patch with four neighbours")
        if (lowest := int(index.tokens.min())) < 0 or int(index.tokens.max()) >= len(index.codebook):
            raise ConfigError(f"has tokens {lowest} to {int(index.tokens.max())} of {len(index.codebook)} codes")
        lists = about.get("faiss")
        return _with_file(index, file.with_suffix(".faiss"), lists) if lists else index
    except (ConfigError, SafetensorError, OSError) as error:
        raise ConfigError(
            f"{key} = {path!r}: {error}; make it with stage-ray index MODEL PICTURES --out FILE"
        ) from error


def _with_file(index: PatchIndex, file: Path, wanted: str) -> PatchIndex:
    if not file.is_file() or digest(file) != wanted:
        raise ConfigError(f"{file} is not the file that was made with it")
    require_extra(*EXTRA)
    import faiss

    return PatchIndex(index.tokens, index.codebook, faiss.read_index(str(file)))


@lru_cache(maxsize=4)
def cached_index(path: str, key: str, device: torch.device) -> PatchIndex:
    """`load_index` on a device, read once a process."""
    return load_index(path, key).to(device)
