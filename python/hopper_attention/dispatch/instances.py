"""The choice of the compiled instance that solves a problem.

A build may have compiled only a part of what the lists of instances have: `NotCompiled`.
"""

from __future__ import annotations

import functools
from collections.abc import Callable, Iterable, Mapping
from dataclasses import asdict, dataclass
from typing import Any

from hopper_attention.dispatch import manifest
from hopper_attention.dispatch.target import AMPERE, Target, choose

HOPPER = choose((9, 0))


class NotCompiled(NotImplementedError):
    """This build lacks an instance that the lists have; `instance` is its name."""

    def __init__(self, instance: str, what: str):
        self.instance = instance
        super().__init__(
            f"this build has no {what}; rebuild with "
            f"HOPPER_ATTENTION_INSTANCES={manifest.selection_with(instance)}, or use CPU tensors "
            "outside of the simulator, which need no kernel"
        )


def or_listed(target: Target, find: Callable[..., str], *problem: Any) -> str:
    """`find(*problem)`; where `target` launches nothing, an instance that is listed will do."""
    try:
        return find(*problem)
    except NotCompiled as missing:
        if target.launches:
            raise
        return missing.instance


@functools.cache
def forward_instance(
    dtype: str,
    head_dim: int,
    head_dim_v: int,
    mask: str,
    softcap: bool,
    varlen: bool,
    target: Target = HOPPER,
) -> str:
    """The forward instance with the least tile that holds both head dims.

    Raises NotImplementedError, naming what this build has, if nothing does.
    """
    if target.kernels == AMPERE:
        # Masks, softcap and lengths are arguments.
        return _attention_instance("ampere_forward", {"dtype": dtype}, head_dim, head_dim_v, target)
    wanted = _by_mask(dtype, mask, softcap, varlen)
    return _attention_instance("forward", wanted, head_dim, head_dim_v, target)


@functools.cache
def forward_fp8_instance(
    head_dim: int,
    head_dim_v: int,
    mask: str,
    softcap: bool,
    varlen: bool,
    two_level: bool | None,
    exact_softmax: bool = True,
) -> str:
    """Like `forward_instance`, for e4m3; `two_level` None: two levels where there is one."""
    if not exact_softmax and (softcap or mask == "local"):
        raise NotImplementedError(
            "exact_softmax=False: no kernel has windows, chunks or softcap; use exact_softmax=True"
        )
    codes, refusals = not exact_softmax, []
    for level in (True, False) if two_level is None else (two_level,):
        try:
            wanted = _by_mask("e4m3", mask, softcap, varlen, two_level=level, codes=codes)
            return _attention_instance("forward_fp8", wanted, head_dim, head_dim_v, HOPPER)
        except NotImplementedError as refusal:
            refusals.append(refusal)
    # What a rebuild would bring comes before what exists nowhere.
    raise min(refusals, key=lambda refusal: not isinstance(refusal, NotCompiled))


def is_two_level(instance: str) -> bool:
    """Say whether an FP8 instance, compiled or not, adds P V of each key block to O in float32."""
    return bool(manifest.config_of(instance)["two_level"])


@dataclass(frozen=True)
class BackwardInstances:
    """The three kernels of one backward, and how dQ accumulates between them."""

    preprocess: str
    main: str
    postprocess: str
    head_dim: int
    """Columns of dQ's tile."""
    tile_m: int
    """Its rows."""
    post_rows: int
    """Rows of what the postprocessing kernel takes as a block of dQ."""


@functools.cache
def backward_instances(
    dtype: str,
    head_dim: int,
    head_dim_v: int,
    mask: str,
    softcap: bool,
    varlen: bool,
    target: Target = HOPPER,
) -> BackwardInstances:
    """Like `forward_instance`, for the kernels of backward."""
    main = main_backward_instance(dtype, head_dim, head_dim_v, mask, softcap, varlen, target)
    config = manifest.instances()[main].config
    tile = {"head_dim": config["head_dim"], "tile_m": config["tile_m"]}
    # Ampere's postprocessing serves all tiles.
    of_tile = {} if target.kernels == AMPERE else tile
    family = manifest.instances()[main].family
    post = _helper_instance(f"{family}_postprocess", {"dtype": dtype, **of_tile}, target)
    return BackwardInstances(
        _helper_instance(f"{family}_preprocess", {"dtype": dtype}, target),
        main,
        post,
        **tile,
        post_rows=manifest.instances()[post].config["tile_m"],
    )


@functools.cache
def main_backward_instance(
    dtype: str,
    head_dim: int,
    head_dim_v: int,
    mask: str,
    softcap: bool,
    varlen: bool,
    target: Target = HOPPER,
) -> str:
    """Like `forward_instance`, for the kernel that makes dK and dV and adds up dQ."""
    family, wanted = "ampere_backward", {"dtype": dtype}
    if target.kernels != AMPERE:
        family, wanted = "backward", _by_mask(dtype, mask, softcap, varlen)
    return _attention_instance(family, wanted, head_dim, head_dim_v, target)


@functools.cache
def quantize_instance(dtype: str, head_dim: int, transposed: bool) -> str:
    """The quantisation kernel with the least tile that holds `head_dim` columns."""
    return _column_instance("quantize", {"dtype": dtype, "transposed": transposed}, head_dim)


@functools.cache
def narrow_instance(head_dim: int, transposed: bool) -> str:
    """Like `quantize_instance`, for e4m3 from e5m2."""
    return _column_instance("narrow", {"transposed": transposed}, head_dim)


@functools.cache
def abs_max_instance(dtype: str, head_dim: int) -> str:
    """Like `quantize_instance`, for greatest magnitudes."""
    return _column_instance("quantize_absmax", {"dtype": dtype}, head_dim)


@functools.cache
def column_sums_instance(dtype: str) -> str:
    return _helper_instance("quantize_sums", {"dtype": dtype})


@functools.cache
def column_means_instance() -> str:
    """Return the kernel that makes means of the sums of `column_sums_instance`."""
    return _helper_instance("quantize_means", {})


@functools.cache
def arrange_instance(by_columns: bool) -> str:
    """Return the kernel for V whose columns, else whose rows, lie together."""
    return _helper_instance("arrange", {"by_columns": by_columns})


def _column_instance(family: str, wanted: dict[str, Any], head_dim: int) -> str:
    """The instance of `family` with the least tile that holds `head_dim` columns."""
    for candidates in (_compiled(), _listed()):
        columns = {c.config["columns"] for c in candidates if c.matches(family, wanted, HOPPER)}
        if fitting := [n for n in columns if n >= head_dim]:
            return _helper_instance(family, {**wanted, "columns": min(fitting)})
    return _helper_instance(family, {**wanted, "columns": head_dim})


def _helper_instance(family: str, wanted: dict[str, Any], target: Target = HOPPER) -> str:
    kind = ", ".join(f"{key}={value}" for key, value in wanted.items())
    what = f"{family} kernel for {kind}"
    for candidate in _compiled():
        if candidate.matches(family, wanted, target):
            return candidate.name
    for candidate in _listed():
        if candidate.matches(family, wanted, target):
            raise NotCompiled(candidate.name, what)
    raise NotImplementedError(f"there is no {what}")


def _attention_instance(
    family: str, wanted: dict[str, Any], head_dim: int, head_dim_v: int, target: Target
) -> str:
    """The instance of `family` with the least tile that holds both head dims.

    Of several with the same head dims the one that makes most of the target's shared memory.
    """
    compiled = _tiles(_compiled(), family, wanted, target)
    if fitting := _least(compiled, head_dim, head_dim_v):
        return fitting
    kind = ", ".join(f"{key}={value}" for key, value in wanted.items())
    dims = f"head_dim {head_dim} with head_dim_v {head_dim_v}"
    tiles = _tiles(_listed(), family, wanted, target)
    if fitting := _least(tiles, head_dim, head_dim_v):
        raise NotCompiled(fitting, f"{family} kernel for {kind}, {dims}")
    if not tiles:
        raise NotImplementedError(f"there is no {family} kernel for {kind}")
    have = ", ".join(f"{d}/{dv}" for d, dv in sorted(tiles))
    nearest = min(tiles, key=lambda tile: abs(tile[0] - head_dim) + abs(tile[1] - head_dim_v))
    raise NotImplementedError(
        f"{dims} has no {family} kernel for {kind}; have up to one of {have} (nearest: "
        f"{nearest[0]}/{nearest[1]})"
    )


@dataclass(frozen=True)
class _Candidate:
    """A compiled or listed instance, so far as the choice depends on it."""

    name: str
    family: str
    architecture: str
    config: Mapping[str, Any]
    shared_memory_bytes: int

    def matches(self, family: str, wanted: dict[str, Any], target: Target) -> bool:
        return (
            self.family == family
            and self.architecture == target.architecture
            and self.shared_memory_bytes <= target.shared_memory
            and wanted.items() <= self.config.items()
        )


def _compiled() -> list[_Candidate]:
    return [
        _Candidate(i.name, i.family, i.architecture, i.config, i.shared_memory_bytes)
        for i in manifest.instances().values()
    ]


def _listed() -> list[_Candidate]:
    return [
        _Candidate(i.name, i.family, i.architecture, asdict(i.config), i.config.shared_memory_bytes)
        for i in manifest.listed().values()
    ]


Tiles = dict[tuple[int, int], _Candidate]
"""Candidates by (head_dim, head_dim_v)."""


def _tiles(
    candidates: Iterable[_Candidate], family: str, wanted: dict[str, Any], target: Target
) -> Tiles:
    tiles: Tiles = {}
    for candidate in candidates:
        if candidate.matches(family, wanted, target):
            dims = (candidate.config["head_dim"], candidate.config["head_dim_v"])
            known = tiles.get(dims)
            if known is None or known.shared_memory_bytes < candidate.shared_memory_bytes:
                tiles[dims] = candidate
    return tiles


def _least(tiles: Tiles, head_dim: int, head_dim_v: int) -> str:
    """The name of the least that holds both head dims; empty if none does."""
    fitting = [dims for dims in tiles if dims[0] >= head_dim and dims[1] >= head_dim_v]
    return tiles[min(fitting, key=sum)].name if fitting else ""


def _by_mask(dtype: str, mask: str, softcap: bool, varlen: bool, **more: bool) -> dict[str, Any]:
    """Return the values by which Hopper's instances differ, beside head dims."""
    mask = "local" if softcap else mask  # windows that hide nothing, or what causal hides
    return {"dtype": dtype, "mask": mask, "softcap": softcap, "varlen": varlen, **more}


def packs_heads(
    dtype: str,
    head_dim: int,
    head_dim_v: int,
    mask: str,
    softcap: bool,
    group: int,
    seqlen_q: int,
    wanted: bool | None,
    target: Target = HOPPER,
) -> bool:
    """Say whether a key head's `group` query heads share tiles of at most `seqlen_q` positions.

    If it is left to us (`wanted` None): where that saves a third of the tiles.  Such tiles are
    loaded and stored row by row, without TMA.
    """
    if group == 1 or wanted is False:
        return False
    if wanted:
        return True
    try:
        name = forward_instance(dtype, head_dim, head_dim_v, mask, softcap, True, target)
    except NotImplementedError:
        return False  # not in this build
    tile_m = manifest.instances()[name].config["tile_m"]
    apart, together = group * -(-seqlen_q // tile_m), -(-group * seqlen_q // tile_m)
    return 3 * together <= 2 * apart
