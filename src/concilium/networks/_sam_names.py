"""Segment-Anything's tensors under the names of the authors' checkpoints and of Hugging Face's, and tables for other sizes.

Original: `segment_anything` (`image_encoder`, `prompt_encoder`, `mask_decoder`). Hugging Face: `SamModel` of `transformers`
(`vision_encoder`, `shared_image_embedding`, ...). Names are written out for `MOST` blocks; what a smaller network lacks is not
looked for.
"""

from __future__ import annotations

from collections.abc import Iterable, Iterator

from torch import Tensor
from torch.nn import functional

from concilium.networks._sam_blocks import stretched
from concilium.networks._sam_decoder import LAYERS, MASKS

MOST = 48
"""Blocks of the deepest network whose names are known; ViT-H has 32."""
POSITION, TABLES = "embed.position", (".relative_rows", ".relative_columns")
"""Tensors whose size is that of the image that the network was made for."""
_PAIR = ("weight", "bias")
_Names = Iterator[tuple[str, str, str]]
"""Ours, the authors', Hugging Face's."""


def names(there: Iterable[str]) -> dict[str, str]:
    """Our name of a tensor by each of the names that it has in a file with these names.

    Of three layers in a row the second is `layers.1` in the authors' layout and `layers.0` in Hugging Face's.
    """
    if any("vision_encoder." in name for name in there):
        found = {hugging_face: ours for ours, _, hugging_face in _all()}
        return found | {
            "prompt_encoder.shared_embedding.positional_embedding": "decoder.prompts.frequencies"
        }  # its second
    return {original: ours for ours, original, _ in _all()}


def refitted(name: str, tensor: Tensor, shape: tuple[int, ...]) -> Tensor | None:
    """The tensor of this name, made for images of another size, in this shape; `None` where that cannot be.

    Positions are interpolated bicubically, distances linearly, as the network does for images of another size than its own.
    """
    if name == POSITION and tensor.ndim == len(shape) == 4 and tensor.shape[::3] == (1, shape[3]) and tensor.numel():
        return placed(tensor, (shape[1], shape[2]))
    if name.endswith(TABLES) and tensor.ndim == len(shape) == 2 and tensor.shape[1] == shape[1] and len(tensor):
        return stretched(tensor, shape[0])
    return None


def placed(position: Tensor, size: tuple[int, int]) -> Tensor:
    """The table of positions (1, g, g, C) for as many patches, (1, h, w, C)."""
    if position.shape[1:3] == size:
        return position
    x = position.permute(0, 3, 1, 2)
    return functional.interpolate(x, size, mode="bicubic", align_corners=False).permute(0, 2, 3, 1)


def _all() -> _Names:
    yield from _encoder()
    yield from _prompts()
    yield from _decoder()
    yield from _head()


def _both(ours: str, original: str, hugging_face: str) -> _Names:
    """Weight and bias of one layer."""
    for of in _PAIR:
        yield f"{ours}.{of}", f"{original}.{of}", f"{hugging_face}.{of}"


def _encoder() -> _Names:
    theirs, faces = "image_encoder", "vision_encoder"
    yield POSITION, f"{theirs}.pos_embed", f"{faces}.pos_embed"
    yield from _both("embed.patches", f"{theirs}.patch_embed.proj", f"{faces}.patch_embed.projection")
    for i in range(MOST):
        block, original, face = (
            (f"block{i}" if i else "embed") + ".block",
            f"{theirs}.blocks.{i}",
            f"{faces}.layers.{i}",
        )
        yield from _both(f"{block}.norm_attention", f"{original}.norm1", f"{face}.layer_norm1")
        yield from _both(f"{block}.norm_linear", f"{original}.norm2", f"{face}.layer_norm2")
        yield from _both(f"{block}.attention.inputs", f"{original}.attn.qkv", f"{face}.attn.qkv")
        yield from _both(f"{block}.attention.output", f"{original}.attn.proj", f"{face}.attn.proj")
        yield from _both(f"{block}.linear.0", f"{original}.mlp.lin1", f"{face}.mlp.lin1")
        yield from _both(f"{block}.linear.2", f"{original}.mlp.lin2", f"{face}.mlp.lin2")
        for ours, axis in zip(TABLES, "hw", strict=True):
            yield f"{block}.attention{ours}", f"{original}.attn.rel_pos_{axis}", f"{face}.attn.rel_pos_{axis}"
    for ours, original, face in (("0", "0", "conv1"), ("2", "2", "conv2")):
        yield f"neck.layers.{ours}.weight", f"{theirs}.neck.{original}.weight", f"{faces}.neck.{face}.weight"
    yield from _both("neck.layers.1.norm", f"{theirs}.neck.1", f"{faces}.neck.layer_norm1")
    yield from _both("neck.layers.3.norm", f"{theirs}.neck.3", f"{faces}.neck.layer_norm2")


def _prompts() -> _Names:
    ours, theirs = "decoder.prompts", "prompt_encoder"
    frequencies = "pe_layer.positional_encoding_gaussian_matrix"
    yield f"{ours}.frequencies", f"{theirs}.{frequencies}", "shared_image_embedding.positional_embedding"
    for i in range(4):
        yield f"{ours}.kinds.{i}", f"{theirs}.point_embeddings.{i}.weight", f"{theirs}.point_embed.{i}.weight"
    yield f"{ours}.no_point", f"{theirs}.not_a_point_embed.weight", f"{theirs}.not_a_point_embed.weight"
    yield f"{ours}.no_mask", f"{theirs}.no_mask_embed.weight", f"{theirs}.no_mask_embed.weight"
    for i, face in ((0, "conv1"), (3, "conv2"), (6, "conv3")):
        yield from _both(f"{ours}.masks.{i}", f"{theirs}.mask_downscaling.{i}", f"{theirs}.mask_embed.{face}")
    for i, face in ((1, "layer_norm1"), (4, "layer_norm2")):
        yield from _both(f"{ours}.masks.{i}.norm", f"{theirs}.mask_downscaling.{i}", f"{theirs}.mask_embed.{face}")


def _attend(ours: str, theirs: str) -> _Names:
    for name in ("query", "key", "value", "output"):
        there = f"{theirs}.{'out' if name == 'output' else name[0]}_proj"
        yield from _both(f"{ours}.{name}", there, there)


def _decoder() -> _Names:
    theirs = "mask_decoder"
    yield "decoder.quality", f"{theirs}.iou_token.weight", f"{theirs}.iou_token.weight"
    yield "decoder.masks", f"{theirs}.mask_tokens.weight", f"{theirs}.mask_tokens.weight"
    norms = ("norm_tokens", "norm_to_image", "norm_linear", "norm_to_tokens")
    for i in range(LAYERS):
        ours, there = f"decoder.layers.{i}", f"{theirs}.transformer.layers.{i}"
        yield from _attend(f"{ours}.tokens", f"{there}.self_attn")
        yield from _attend(f"{ours}.to_image", f"{there}.cross_attn_token_to_image")
        yield from _attend(f"{ours}.to_tokens", f"{there}.cross_attn_image_to_token")
        for n, norm in enumerate(norms, 1):
            yield from _both(f"{ours}.{norm}", f"{there}.norm{n}", f"{there}.layer_norm{n}")
        for layer, name in (("0", "lin1"), ("2", "lin2")):
            yield from _both(f"{ours}.linear.{layer}", f"{there}.mlp.{name}", f"{there}.mlp.{name}")
    there = f"{theirs}.transformer"
    yield from _attend("decoder.to_image", f"{there}.final_attn_token_to_image")
    yield from _both("decoder.norm_to_image", f"{there}.norm_final_attn", f"{there}.layer_norm_final_attn")
    enlarge = "decoder.enlarge"
    yield from _both(f"{enlarge}.0", f"{theirs}.output_upscaling.0", f"{theirs}.upscale_conv1")
    yield from _both(f"{enlarge}.1.norm", f"{theirs}.output_upscaling.1", f"{theirs}.upscale_layer_norm")
    yield from _both(f"{enlarge}.3", f"{theirs}.output_upscaling.3", f"{theirs}.upscale_conv2")


def _head() -> _Names:
    theirs = "mask_decoder"
    places = {f"masks.{i}": f"{theirs}.output_hypernetworks_mlps.{i}" for i in range(MASKS)}
    for ours, there in (places | {"quality": f"{theirs}.iou_prediction_head"}).items():
        for i, face in enumerate(("proj_in", "layers.0", "proj_out")):
            yield from _both(f"head0.{ours}.{2 * i}", f"{there}.layers.{i}", f"{there}.{face}")
