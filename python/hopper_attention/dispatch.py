"""From a problem to the name of the compiled instance that solves it.

The manifest that the build writes is the only list: what was not compiled is not supported.
"""

from __future__ import annotations

import functools
from dataclasses import dataclass

from hopper_attention import manifest, selection
from hopper_attention.manifest import CompiledInstance
from hopper_attention.selection import Target

HOPPER = selection.choose((9, 0))


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
    if target.backend == selection.AMPERE:
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
) -> str:
    """As `forward_instance`, for e4m3; `two_level` None: if there is an instance for it."""
    for level in (True, False) if two_level is None else (two_level,):
        try:
            wanted = _by_mask("e4m3", mask, softcap, varlen, two_level=level)
            return _attention_instance("forward_fp8", wanted, head_dim, head_dim_v, HOPPER)
        except NotImplementedError:
            if two_level is not None or not level:
                raise
    raise AssertionError


def is_two_level(instance: str) -> bool:
    """Of an FP8 instance."""
    return bool(manifest.instances()[instance].config["two_level"])


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
    """As `forward_instance`, of backward."""
    if target.backend == selection.AMPERE:
        family, wanted = "ampere_backward", dict[str, str | bool](dtype=dtype)
    else:
        family, wanted = "backward", _by_mask(dtype, mask, softcap, varlen)
    main = _attention_instance(family, wanted, head_dim, head_dim_v, target)
    config = manifest.instances()[main].config
    tile = {"head_dim": config["head_dim"], "tile_m": config["tile_m"]}
    # Ampere's postprocessing serves all tiles.
    of_tile = {} if target.backend == selection.AMPERE else tile
    post = _helper_instance(f"{family}_postprocess", {"dtype": dtype, **of_tile}, target)
    return BackwardInstances(
        _helper_instance(f"{family}_preprocess", {"dtype": dtype}, target),
        main,
        post,
        **tile,
        post_rows=manifest.instances()[post].config["tile_m"],
    )


@functools.cache
def quantize_instance(dtype: str, head_dim: int, arranged: bool) -> str:
    """The quantisation kernel with the least tile that holds `head_dim` columns."""
    return _column_instance("quantize", {"dtype": dtype, "arranged": arranged}, head_dim)


@functools.cache
def narrow_instance(head_dim: int, arranged: bool) -> str:
    """As `quantize_instance`: e4m3 from e5m2."""
    return _column_instance("narrow", {"arranged": arranged}, head_dim)


@functools.cache
def abs_max_instance(dtype: str, head_dim: int) -> str:
    """As `quantize_instance`: greatest magnitudes."""
    return _column_instance("quantize_absmax", {"dtype": dtype}, head_dim)


@functools.cache
def column_sums_instance(dtype: str) -> str:
    return _helper_instance("quantize_sums", {"dtype": dtype})


@functools.cache
def column_means_instance() -> str:
    """From the sums of `column_sums_instance`."""
    return _helper_instance("quantize_means", {})


@functools.cache
def arrange_instance(by_columns: bool) -> str:
    """For V whose columns, else whose rows, lie together."""
    return _helper_instance("arrange", {"by_columns": by_columns})


def _column_instance(family: str, wanted: dict[str, str | bool], head_dim: int) -> str:
    columns = {
        instance.config["columns"]
        for instance in manifest.instances().values()
        if instance.family == family and wanted.items() <= instance.config.items()
    }
    tile = min((n for n in columns if n >= head_dim), default=head_dim)
    return _helper_instance(family, {**wanted, "columns": tile})


def _helper_instance(family: str, wanted: dict[str, str | int], target: Target = HOPPER) -> str:
    for name, instance in manifest.instances().items():
        if (
            instance.family == family
            and instance.architecture == target.architecture
            and wanted.items() <= instance.config.items()
        ):
            return name
    kind = ", ".join(f"{key}={value}" for key, value in wanted.items())
    raise NotImplementedError(
        f"this build has no {family} kernel for {kind}; rebuild with "
        "HOPPER_ATTENTION_INSTANCES=full"
    )


def _attention_instance(
    family: str, wanted: dict[str, str | bool], head_dim: int, head_dim_v: int, target: Target
) -> str:
    """The instance of `family` with the least tile that holds both head dims.

    Of several with the same head dims the one that makes most of the target's shared memory.
    """
    tiles: dict[tuple[int, int], CompiledInstance] = {}
    for instance in manifest.instances().values():
        config = instance.config
        if (
            instance.family == family
            and instance.architecture == target.architecture
            and instance.shared_memory_bytes <= target.shared_memory
            and wanted.items() <= config.items()
        ):
            dims = (config["head_dim"], config["head_dim_v"])
            known = tiles.get(dims)
            if known is None or known.shared_memory_bytes < instance.shared_memory_bytes:
                tiles[dims] = instance
    fitting = [dims for dims in tiles if dims[0] >= head_dim and dims[1] >= head_dim_v]
    if fitting:
        return tiles[min(fitting, key=sum)].name
    kind = ", ".join(f"{key}={value}" for key, value in wanted.items())
    if not tiles:
        raise NotImplementedError(
            f"this build has no {family} kernel for {kind} on {target.architecture}; rebuild with "
            "HOPPER_ATTENTION_INSTANCES=full"
        )
    have = ", ".join(f"{d}/{dv}" for d, dv in sorted(tiles))
    nearest = min(tiles, key=lambda dims: abs(dims[0] - head_dim) + abs(dims[1] - head_dim_v))
    raise NotImplementedError(
        f"head_dim {head_dim} with head_dim_v {head_dim_v} has no {family} kernel for {kind}; have "
        f"up to one of {have} (nearest: {nearest[0]}/{nearest[1]})"
    )


def _by_mask(
    dtype: str, mask: str, softcap: bool, varlen: bool, **more: bool
) -> dict[str, str | bool]:
    """What Hopper's instances are told apart by, beside head dims."""
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
    """Whether the `group` query heads of a key head share tiles, of at most `seqlen_q` positions.

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
