"""Lay out three public sets, as they are downloaded, as nnU-Net raw folders: the data of the studies of the same names.

    python studies/public_sets.py kvasir-seg Kvasir-SEG --out data/kvasir-seg

What is downloaded must have these folders, with one image and one mask for each case:

    kvasir-seg   images/NAME.jpg, masks/NAME.jpg. Kvasir-SEG (Jha et al. 2020, arXiv:1911.07069): 1,000 polyps in endoscopy.
    ham10k       HAM10000_images_part_1/NAME.jpg, HAM10000_images_part_2/NAME.jpg (or one folder HAM10000_images),
                 HAM10000_segmentations_lesion_tschandl/NAME_segmentation.png, and HAM10000_metadata (or .csv, .tab), whose
                 lesion_id says which images must stay together. HAM10000 (Tschandl et al. 2018, doi:10.1038/sdata.2018.161), with
                 the masks of Tschandl et al. 2020 (doi:10.1038/s41591-020-0942-0): 10,015 pictures of dermoscopy.
    blastocyst   images/NAME.*, masks/NAME.*, whose grey levels are 0, 64 or 105 (zona pellucida), 128 (trophectoderm), 192 or 226
                 (blastocoel) and 255 (inner cell mass), as in MedSegNet10 (Shiranthika et al. 2026, arXiv:2503.20830); or Images,
                 GT_ZP, GT_TE and GT_ICM, a mask for each structure, as the Human Blastocyst Dataset is published (Saeedi et al.
                 2017, doi:10.1109/TBME.2017.2759665): embryos in microscopy, without the blastocoel.

Names are matched without regard to capitals. A case without a mask, or with one of another size, is left out and named, and the
exit code is 4.
"""

from __future__ import annotations

import argparse
import csv
import json
import sys
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import SimpleITK as sitk
from numpy.typing import NDArray
from rich.progress import track

PICTURES = {".bmp", ".jpeg", ".jpg", ".png", ".tif", ".tiff"}
WHITE = 100
"""A mask is foreground above it: JPEG leaves shades of grey at edges."""
LEVELS = (32, 117, 160, 241)
"""Where the grey levels of the blastocysts' masks divide into the five labels."""


@dataclass(frozen=True)
class Case:
    """One image with its masks."""

    name: str
    image: Path
    masks: tuple[Path, ...]
    patient: str = ""


@dataclass(frozen=True)
class Set:
    """How a set is found and read."""

    find: Callable[[Path], list[Case]]
    label: Callable[[list[NDArray[np.uint8]]], NDArray[np.uint8]]
    """Makes one label map of a case's masks."""
    labels: tuple[str, ...]


def paired(folder: Path) -> list[Case]:
    """Images and masks of the same names."""
    masks = pictures(folder, "masks")
    return [Case(path.stem, path, _known(masks.get(name))) for name, path in pictures(folder, "images").items()]


def ham10k(folder: Path) -> list[Case]:
    """The images of one lesion are one patient's."""
    parts = [p for p in sorted(folder.iterdir()) if p.is_dir() and p.name.lower().startswith("ham10000_images")]
    images = {name: path for part in parts for name, path in pictures(folder, part.name).items()}
    masks = pictures(folder, "HAM10000_segmentations_lesion_tschandl")
    lesions = _lesions(folder)
    return [
        Case(path.stem, path, _known(masks.get(f"{name}_segmentation")), lesions.get(name, ""))
        for name, path in images.items()
    ]


def blastocyst(folder: Path) -> list[Case]:
    """One mask of grey levels, or one for each of three structures."""
    if not (folder / "GT_ZP").is_dir():
        return paired(folder)
    images = pictures(folder, "images")
    found = {of: pictures(folder, f"GT_{of}") for of in ("ZP", "TE", "ICM")}
    return [
        Case(
            path.stem,
            path,
            _known(*(found[of].get(f"{name} {of}_Mask".lower()) or found[of].get(name) for of in found)),
        )
        for name, path in images.items()
    ]


def pictures(folder: Path, name: str) -> dict[str, Path]:
    """What lies in a folder, by name without the ending, in small letters.

    Raises:
        SystemExit: there is no such folder.
    """
    place = next((p for p in folder.iterdir() if p.is_dir() and p.name.lower() == name.lower()), None)
    if place is None:
        there = ", ".join(sorted(p.name for p in folder.iterdir())) or "nothing"
        raise SystemExit(f"{folder} has no folder {name}, but {there}. Give the folder that holds it.")
    return {p.stem.lower(): p for p in sorted(place.iterdir()) if p.suffix.lower() in PICTURES}


def _known(*masks: Path | None) -> tuple[Path, ...]:
    """The masks, if none is missing."""
    return tuple(m for m in masks if m) if all(masks) else ()


def _lesions(folder: Path) -> dict[str, str]:
    """Image -> lesion, where the table is there."""
    path = next((p for p in sorted(folder.iterdir()) if p.is_file() and p.stem.lower() == "ham10000_metadata"), None)
    if path is None:
        print("There is no HAM10000_metadata: every image counts as a lesion of its own.", file=sys.stderr)
        return {}
    text = path.read_text(encoding="utf-8")
    rows = csv.DictReader(text.splitlines(), delimiter="\t" if "\t" in text.partition("\n")[0] else ",")
    return {row["image_id"].strip().lower(): row["lesion_id"].strip() for row in rows}


def binary(masks: list[NDArray[np.uint8]]) -> NDArray[np.uint8]:
    """1 where the only mask is white."""
    return (masks[0] > WHITE).astype(np.uint8)


def embryo(masks: list[NDArray[np.uint8]]) -> NDArray[np.uint8]:
    """Grey levels in order; of three masks zona pellucida, trophectoderm and inner cell mass, of which later ones win."""
    if len(masks) == 1:
        return np.digitize(masks[0], LEVELS).astype(np.uint8)
    label = np.zeros(masks[0].shape, np.uint8)
    for value, mask in enumerate(masks, start=1):
        label[mask > WHITE] = value
    return label


SETS: Mapping[str, Set] = {
    "kvasir-seg": Set(paired, binary, ("polyp",)),
    "ham10k": Set(ham10k, binary, ("lesion",)),
    "blastocyst": Set(blastocyst, embryo, ("zona_pellucida", "trophectoderm", "blastocoel", "inner_cell_mass")),
}


def lay_out(name: str, source: Path, out: Path) -> tuple[int, list[str]]:
    """Write the raw folder; how many cases it has, and a line for each that was left out.

    Raises:
        SystemExit: a folder is missing, or `out` is not empty.
    """
    if out.exists() and any(out.iterdir()):
        raise SystemExit(f"{out} is not empty. Give another --out.")
    of = SETS[name]
    cases = sorted(of.find(source), key=lambda case: case.name)
    for folder in ("imagesTr", "labelsTr"):
        (out / folder).mkdir(parents=True)
    patients, left_out = {}, []
    for case in track(cases, description=name) if sys.stderr.isatty() else cases:
        called = case.name.replace(" ", "_")
        problem = _write(case, called, of, out)
        if problem:
            left_out.append(f"{case.image.name}: {problem}")
        else:
            patients[called] = case.patient or called
    # where it was not drawn it is no label: what nobody looked for must not be learnt to be background
    drawn = [label for label in of.labels if label != "blastocoel" or all(len(case.masks) < 3 for case in cases)]
    about = {
        "channel_names": {"0": "R", "1": "G", "2": "B"},
        "labels": {"background": 0, **{label: i for i, label in enumerate(drawn, start=1)}},
        "numTraining": len(patients),
        "file_ending": ".png",
        "patient": patients,
    }
    (out / "dataset.json").write_text(json.dumps(about, indent=1) + "\n", encoding="utf-8")
    return len(patients), left_out


def _write(case: Case, called: str, of: Set, out: Path) -> str:
    """Write image and label map; why not, if not."""
    if not case.masks:
        return "it has no mask"
    try:
        image = _array(case.image)
        masks = [_array(path)[..., 0] for path in case.masks]
    except RuntimeError as e:  # SimpleITK's, of whatever it cannot read
        return f"it cannot be read ({str(e).strip().splitlines()[-1].strip()})"
    if any(mask.shape != image.shape[:2] for mask in masks):
        return f"it has {image.shape[:2]} pixels, a mask {next(m.shape for m in masks if m.shape != image.shape[:2])}"
    sitk.WriteImage(sitk.GetImageFromArray(image, isVector=True), out / "imagesTr" / f"{called}_0000.png")
    sitk.WriteImage(sitk.GetImageFromArray(of.label(masks)), out / "labelsTr" / f"{called}.png")
    return ""


def _array(path: Path) -> NDArray[np.uint8]:
    """The picture as (rows, columns, 3)."""
    values = sitk.GetArrayFromImage(sitk.ReadImage(path))
    return np.repeat(values[..., None], 3, axis=-1) if values.ndim == 2 else values[..., :3]


def _arguments() -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("set", choices=sorted(SETS))
    parser.add_argument("source", type=Path, help="What was downloaded, unpacked.")
    parser.add_argument("--out", type=Path, required=True, help="Raw folder to write.")
    return parser.parse_args()


def main() -> None:
    """The command."""
    given = _arguments()
    n, left_out = lay_out(given.set, given.source, given.out)
    print("\n".join([f"{n} cases", *(f"Left out: {line}" for line in left_out)]))
    raise SystemExit(4 if left_out or not n else 0)


if __name__ == "__main__":
    main()
