"""Segment-Anything without prompts: an image encoder, a mask decoder, and masks for any labels.

Kirillov et al., Segment Anything, ICCV 2023 (arXiv:2304.02643), made automatic as Liu et al., FedFMS, MICCAI 2024
(arXiv:2403.05408) do: the decoder gets no prompt. Trained whole it is their FedSAM; with `adapt = "adapters"`, where these and
the decoder train, their FedMSA. Deviations from FedFMS:

- Pixels are normalised as SAM's authors do (`_sam_pixels.py`); FedFMS leaves that out.
- Labels exclude each other: the background's logit is 0, and a softmax goes over it and what the network says of the others. With
  one label that is FedFMS's sigmoid of the first mask, with the same tensors (93,735,472 parameters for ViT-B); with C labels a
  1×1 convolution makes C logits of the four masks, as theirs. Regions have a logit each, and no background.
- Logits are as large as the image, not a quarter.
- Adapters begin as nothing (`_sam_adapt.py`), and there is none for the depth in 2D.

The embedding of patches is a linear map of the image: it runs at the site with the first block. The stream that blocks add to
still holds it, so a later cut shows less of the image only as far as blocks have drowned it. Masks are logits: the decoder leaves
the maps and tokens that they are made of, and the head makes them. Images may have any size: at the far ends they are filled to
whole patches, and tables of positions and distances are interpolated. Volumes are slices along the first axis of the plan, where
nnU-Net puts that of the largest spacing.
"""

from __future__ import annotations

from collections.abc import Callable, Collection, Mapping
from typing import Any, Literal, TypeAlias

from torch import Tensor

from concilium.errors import StudyError
from concilium.networks import Stage, Stages
from concilium.networks._layers import check_sizes, strides_of
from concilium.networks._sam_adapt import Adapt, Adaptation, added, merged
from concilium.networks._sam_decoder import Decoder
from concilium.networks._sam_names import names, refitted
from concilium.networks._sam_pixels import COLOURS, scales_of
from concilium.networks._sam_prompted import Answers, prompted
from concilium.networks._sam_stages import Embed, Head, Neck, OneBlock, Sizes

__all__ = ["Answers", "added", "build", "folded", "merged", "names_elsewhere", "prompted", "refitted"]

Size: TypeAlias = Literal["vit_b", "vit_l", "vit_t"]
SIZES: Mapping[str, tuple[int, int]] = {"vit_b": (768, 12), "vit_l": (1024, 24), "vit_t": (192, 12)}
"""Width and blocks."""
EVERYWHERE = frozenset({"vit_t"})
"""Sizes all of whose blocks look at the whole image."""
HEAD = 64
"""Features of each head of attention."""
ADAPTED = ("adapters", "decoder.[!p]*", "heads")
"""What trains where something is added: that, and all of the decoder but what only prompts use."""
MULTIPLE = 16
"""The decoder's features: its eight heads have half of them, its maps an eighth."""


def build(
    *,
    n_channels: int,
    n_labels: int,
    plan: Mapping[str, Any],
    deep_supervision: bool = True,
    size: Size = "vit_b",
    width: int | None = None,
    depth: int | None = None,
    heads: int | None = None,
    patch: int = 16,
    image_size: int = 1024,
    window: int = 14,
    whole_image_blocks: tuple[int, ...] | None = None,
    decoder_features: int = 256,
    adapt: Adapt = "none",
    rank: int = 4,
    adapter_features: int | None = None,
    through_plane: bool = False,
    intensity: Literal["plan", "zscore", "0-1", "0-255"] = "plan",
    checkpointing: bool = False,
) -> Stages:
    """Segment-Anything without prompts, for pictures and, slice by slice, for volumes.

    Args:
        n_channels: channels of the image; 3 are colours, 1 is all three of them, others are mixed into three.
        n_labels: channels of the logits, background included.
        plan: one configuration of nnU-Net's plan; read for the number of axes, the normalisation, and whether labels are regions.
        deep_supervision: without effect, there is one head.
        size: `vit_b` and `vit_l` as published; `vit_t`, a plain small one (EfficientSAM-Ti's width and depth, not its weights).
        width: features of the encoder; omitted: those of `size` (768, 1024, 192).
        depth: its blocks; omitted: those of `size` (12, 24, 12).
        heads: heads of its attention; omitted: one for each 64 features.
        patch: side of the squares that the image is cut into [voxels].
        image_size: side of the image that tables of positions and distances are made for [voxels]; for others they are
            interpolated.
        window: side of the windows of attention [patches].
        whole_image_blocks: blocks, from 0, whose attention has no windows; omitted: four, evenly spaced; of `vit_t` all.
        decoder_features: features of the neck and the decoder, a multiple of 16.
        adapt: what is added to be trained in place of the rest: `none`, `adapters` (two a block, in 3D perhaps a third) or
            `lora` (low rank, on queries and values). Where the study does not say what trains, these do, and the decoder.
        rank: of `lora`.
        adapter_features: between the two layers of an adapter; omitted: a quarter of the width.
        through_plane: in 3D, a third adapter a block, which looks at the neighbouring slices; needs `adapt = "adapters"`.
        intensity: what values are: z-scores, or pictures from 0 to 1 or to 255; `plan`: as the plan says.
        checkpointing: on the way back, compute each block once more, in place of keeping its inner values.

    Returns:
        Stages `embed`, `block1`, ..., `neck`, `decoder`, `head0`.

    Raises:
        StudyError: a size or a combination is not possible.
    """
    dims = len(strides_of(plan)[0])
    sizes = _settled(size, width, depth, heads, patch, image_size, window, whole_image_blocks)
    n_blocks = depth or SIZES[size][1]
    features = adapter_features if adapter_features is not None else max(1, sizes.width // 4)
    check_sizes({}, rank=rank, adapter_features=features)
    _check(decoder_features, adapt, through_plane, dims)
    adaptation = Adaptation(adapt, rank, features, through_plane)
    scales = scales_of(plan, n_channels, intensity)
    stages: dict[str, Stage] = {"embed": Embed(scales, sizes, sizes.block(0, adaptation), checkpointing)}
    stages |= {f"block{i}": OneBlock(sizes.block(i, adaptation), checkpointing) for i in range(1, n_blocks)}
    stages["neck"] = Neck(sizes.width, decoder_features)
    stages["decoder"] = Decoder(decoder_features)
    stages["head0"] = Head(
        decoder_features, n_labels, patch=patch, background=n_labels > 1 and not plan.get("regions", False)
    )
    deep = f"block{(n_blocks - 1) // 2}" if n_blocks > 2 else "embed"
    made = Stages(stages, cuts={"shallow": (("embed", "neck"),), "deep": ((deep, "neck"),)})
    mixed = ("embed.pixels.mix.*",) * (n_channels not in (1, COLOURS))
    made.trains = (*trains(adapt=adapt), *mixed) if adapt != "none" else ()
    return made


def trains(*, adapt: str, **_: Any) -> tuple[str, ...]:
    """What of the network trains by these options, where the study does not say; none: everything."""
    return ADAPTED if adapt != "none" else ()


def folded(options: Mapping[str, Any]) -> tuple[dict[str, Any], Callable[[Mapping[str, Tensor]], dict[str, Tensor]]]:
    """The options of the network that is the same without what was added, and what makes its weights of those with it.

    Raises:
        StudyError: nothing was added that is a change of weights.
    """
    if options.get("adapt") != "lora":
        raise StudyError(
            f"[network] adapt = {options.get('adapt')!r} cannot be folded into the other weights. Allowed: 'lora'; adapters have "
            "a bend between their layers. Export without --fold."
        )
    return {**options, "adapt": "none"}, merged


def _settled(
    size: Size,
    width: int | None,
    depth: int | None,
    heads: int | None,
    patch: int,
    image_size: int,
    window: int,
    whole: tuple[int, ...] | None,
) -> Sizes:
    """The sizes of the encoder, defaults filled in.

    Raises:
        StudyError: they are not possible.
    """
    own_width, own_depth = SIZES[size]
    width, depth = own_width if width is None else width, own_depth if depth is None else depth
    check_sizes({"image_size": patch}, width=width, depth=depth, patch=patch, image_size=image_size, window=window)
    heads = max(1, width // HEAD) if heads is None else heads
    check_sizes({}, heads=heads)
    if whole is None:
        whole = tuple(range(depth)) if size in EVERYWHERE else tuple({max(0, depth * n // 4 - 1) for n in (1, 2, 3, 4)})
    if width % heads or image_size % patch or any(not 0 <= i < depth for i in whole):
        raise StudyError(
            f"[network] width = {width}, heads = {heads}, image_size = {image_size}, patch = {patch}, whole_image_blocks = "
            f"{sorted(whole)} is not allowed. Allowed: a width that is a multiple of heads, an image_size that is one of patch, "
            f"blocks from 0 to {depth - 1}. Correct them."
        )
    return Sizes(width, heads, window, frozenset(whole), patch, image_size // patch)


def _check(decoder_features: int, adapt: Adapt, through_plane: bool, dims: int) -> None:
    if decoder_features < 1 or decoder_features % MULTIPLE:
        raise StudyError(
            f"[network] decoder_features = {decoder_features} is not allowed. Allowed: multiples of {MULTIPLE}, for it has eight "
            "heads of half of them. Choose one, or leave it out (256)."
        )
    if through_plane and (adapt != "adapters" or dims == 2):
        raise StudyError(
            f"[network] through_plane = true is not possible with adapt = {adapt!r} and patches of {dims} axes. Allowed: with "
            "adapt = 'adapters' and 3 axes, for it looks at the neighbouring slices. Leave it out, or plan in 3D."
        )


def names_elsewhere(
    *, plan: Mapping[str, Any], n_channels: int, n_labels: int, there: Collection[str] = ()
) -> dict[str, str]:
    """Our name of every tensor, by its name in the authors' checkpoints or, where `there` are such, in Hugging Face's."""
    return names(there)
