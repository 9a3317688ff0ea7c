"""What a person looks at after a run, made from `results.json`. One file here: one view."""

TITLES = {"dice": "Dice", "iou": "IoU", "hd95": "95 % Hausdorff distance", "nsd": "Normalised surface Dice"}
SHARES = frozenset({"dice", "iou", "nsd"})
"""Metrics from 0 to 1, where higher is better; the others are distances."""
