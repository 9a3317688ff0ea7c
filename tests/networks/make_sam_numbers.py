"""Write `sam_numbers.json`: what the authors' and Hugging Face's own code make of a small Segment-Anything.

Needs what Concilium must not need, so run it in an environment of its own; it imports nothing of Concilium:

    pip install numpy torch torchvision segment-anything==1.0 transformers
    python tests/networks/make_sam_numbers.py            # a small one, by both
    python tests/networks/make_sam_numbers.py --vit-b    # the authors' ViT-B at 1024 px, besides

Weights are drawn tensor by tensor from the tensor's name in the layout (`drawn`, the same in the tests), so the order of modules
does not matter. Kept are names and shapes of all tensors, and some of the numbers that come out.
"""

from __future__ import annotations

import hashlib
import json
import sys
from functools import partial
from importlib.metadata import version
from pathlib import Path
from typing import Any

import numpy as np
import torch
from segment_anything.modeling import ImageEncoderViT, MaskDecoder, PromptEncoder, Sam, TwoWayTransformer
from torch import Tensor
from transformers.models.sam.configuration_sam import SamConfig
from transformers.models.sam.modeling_sam import SamModel

WIDTH, DEPTH, HEADS, SIDE, PATCH, WINDOW, WHOLE, FEATURES = 32, 3, 2, 80, 16, 3, [1], 32
MEAN, DEVIATION = [123.675, 116.28, 103.53], [58.395, 57.12, 57.375]
BOXES = [[3.0, 5.0, 40.0, 60.0], [20.0, 10.0, 79.0, 30.0]]
POINTS = [[[10.0, 20.0], [30.0, 7.0]], [[60.0, 70.0], [1.0, 2.0]]]
INSIDE = [[1, 0], [1, 1]]


VIT_B_BOXES = [[100.0, 150.0, 700.0, 900.0]]


def drawn(name: str, shape: tuple[int, ...]) -> Tensor:
    """Values of a tensor, from its name alone: normal, of deviation 0.2."""
    seed = int.from_bytes(hashlib.blake2b(name.encode(), digest_size=8).digest(), "big")
    return torch.from_numpy((0.2 * np.random.default_rng(seed).standard_normal(shape)).astype(np.float32))


def fill(network: torch.nn.Module) -> dict[str, str]:
    """Give every tensor its drawn values; returns name -> shape."""
    tensors = network.state_dict()
    shared = {"prompt_encoder.shared_embedding.positional_embedding": "shared_image_embedding.positional_embedding"}
    network.load_state_dict({n: drawn(shared.get(n, n), tuple(t.shape)) for n, t in tensors.items()})
    network.eval()
    return {n: " ".join(map(str, t.shape)) for n, t in tensors.items()}


def some(values: Tensor) -> dict[str, Any]:
    """Shape, mean, deviation, and a few values spread over all."""
    flat = values.double().flatten()
    places = torch.linspace(0, len(flat) - 1, 12).long()
    return {
        "shape": list(values.shape),
        "mean": float(flat.mean()),
        "deviation": float(flat.std()),
        "values": [float(v) for v in flat[places]],
    }


def original() -> dict[str, Any]:
    grid = SIDE // PATCH
    encoder = ImageEncoderViT(
        depth=DEPTH, embed_dim=WIDTH, img_size=SIDE, norm_layer=partial(torch.nn.LayerNorm, eps=1e-6), num_heads=HEADS,
        patch_size=PATCH, use_rel_pos=True, global_attn_indexes=tuple(WHOLE), window_size=WINDOW, out_chans=FEATURES,
    )  # fmt: skip
    prompts = PromptEncoder(
        embed_dim=FEATURES, image_embedding_size=(grid, grid), input_image_size=(SIDE, SIDE), mask_in_chans=16
    )
    transformer = TwoWayTransformer(depth=2, embedding_dim=FEATURES, mlp_dim=8 * FEATURES, num_heads=8)
    decoder = MaskDecoder(transformer_dim=FEATURES, transformer=transformer, iou_head_hidden_dim=FEATURES)
    sam = Sam(encoder, prompts, decoder, pixel_mean=MEAN, pixel_std=DEVIATION)
    tensors = fill(sam)
    image = 255 * drawn("image", (3, SIDE, SIDE)).abs().clamp(max=1)
    embedding = sam.image_encoder(sam.preprocess(image)[None])

    def masks(sparse: Tensor, dense: Tensor) -> tuple[Tensor, Tensor]:
        return sam.mask_decoder.predict_masks(embedding, sam.prompt_encoder.get_dense_pe(), sparse, dense)

    nothing = torch.zeros(1, 0, FEATURES), torch.zeros(1, FEATURES, grid, grid)
    points = torch.tensor(POINTS), torch.tensor(INSIDE)
    boxes = torch.tensor(BOXES)
    asked = {"boxes": (None, boxes), "points": (points, None), "both": (points, boxes)}
    found = {name: masks(*sam.prompt_encoder(points=p, boxes=b, masks=None)) for name, (p, b) in asked.items()}
    coarse = masks(*nothing)[0]
    return {
        "tensors": tensors,
        "embedding": some(embedding),
        "without": some(coarse),
        "large": some(sam.postprocess_masks(coarse, (SIDE, SIDE), (SIDE, SIDE))),
        **{name: some(m) for name, (m, _) in found.items()},
        **{f"{name}_quality": some(q) for name, (_, q) in found.items()},
    }


def drawn_wide(name: str, shape: tuple[int, ...]) -> Tensor:
    """For ViT-B, whose sums are longer: a fifth of that; weights of norms about 1."""
    values = drawn(name, shape)
    return 1 + values if len(shape) == 1 and name.endswith("weight") else values / 5


def vit_b() -> dict[str, Any]:
    from segment_anything import sam_model_registry

    sam = sam_model_registry["vit_b"](checkpoint=None)
    tensors = sam.state_dict()
    sam.load_state_dict({n: drawn_wide(n, tuple(t.shape)) for n, t in tensors.items()})
    sam.eval()
    image = 255 * drawn("image", (3, 1024, 1024)).abs().clamp(max=1)
    embedding = sam.image_encoder(sam.preprocess(image)[None])
    sparse, dense = sam.prompt_encoder(points=None, boxes=torch.tensor(VIT_B_BOXES), masks=None)
    nothing = torch.zeros(1, 0, 256), torch.zeros(1, 256, 64, 64)
    table = sam.prompt_encoder.get_dense_pe()
    return {
        "tensors": {n: " ".join(map(str, t.shape)) for n, t in tensors.items()},
        "embedding": some(embedding),
        "without": some(sam.mask_decoder.predict_masks(embedding, table, *nothing)[0]),
        "boxes": some(sam.mask_decoder.predict_masks(embedding, table, sparse, dense)[0]),
    }


def hugging_face() -> dict[str, Any]:
    sam = SamModel(
        SamConfig(
            vision_config={
                "hidden_size": WIDTH, "num_hidden_layers": DEPTH, "num_attention_heads": HEADS, "image_size": SIDE,
                "patch_size": PATCH, "window_size": WINDOW, "global_attn_indexes": WHOLE, "mlp_dim": 4 * WIDTH,
                "output_channels": FEATURES, "num_pos_feats": FEATURES // 2,
            },
            prompt_encoder_config={
                "hidden_size": FEATURES, "image_size": SIDE, "patch_size": PATCH, "image_embedding_size": SIDE // PATCH,
            },
            mask_decoder_config={
                "hidden_size": FEATURES, "mlp_dim": 8 * FEATURES, "num_attention_heads": 8, "iou_head_hidden_dim": FEATURES,
                "layer_norm_eps": 1e-5,  # as the authors'; 1e-6 is the default here
            },
        )
    )  # fmt: skip
    tensors = fill(sam)
    image = 255 * drawn("image", (3, SIDE, SIDE)).abs().clamp(max=1)
    pixels = ((image - torch.tensor(MEAN)[:, None, None]) / torch.tensor(DEVIATION)[:, None, None])[None]
    asked = [sam(pixel_values=pixels, input_boxes=torch.tensor([BOXES]), multimask_output=m) for m in (False, True)]
    return {
        "tensors": tensors,
        "embedding": some(sam.get_image_embeddings(pixels)),
        "boxes": some(torch.cat([a.pred_masks[0] for a in asked], dim=1)),
        "boxes_quality": some(torch.cat([a.iou_scores[0] for a in asked], dim=1)),
    }


if __name__ == "__main__":
    file = Path(__file__).with_name("sam_numbers.json")
    with torch.no_grad():
        if sys.argv[1:] == ["--vit-b"]:
            made_by = {name: version(name) for name in ("torch", "numpy")} | {"segment-anything": "1.0"}
            numbers = json.loads(file.read_text()) | {"vit_b": {"made by": made_by, **vit_b()}}
        else:
            numbers = {
                "made by": {name: version(name) for name in ("segment-anything", "transformers", "torch", "numpy")},
                "original": original(),
                "hugging_face": hugging_face(),
            }
    file.write_text(json.dumps(numbers, indent=1) + "\n")
