"""Losses. One file here: one loss, of the logits of one scale.

    loss(
        logits: Tensor, labels: Tensor, annotated: Tensor | None, *,
        batch_dice: bool, regions: bool, ignore: int | None, ...options,
    ) -> Tensor

`logits` is (B, L, *patch), `labels` (B, 1, *patch) with label ids; voxels with the id `ignore` do not count. With `regions`,
which may overlap, `labels` is bool (B, L, *patch), and with `ignore` too a last channel marks the voxels that do not count.
Both are passed only where they apply. `annotated` is bool (B, L): which labels or regions somebody looked for in the case of each
patch, the background among them; `None` where all are. A patch in which nothing is annotated changes nothing.
`batch_dice` comes from nnU-Net's plan: overlap is counted over the batch instead of per patch.
"""
