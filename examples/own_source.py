"""Scans in a format of your own become a data set that `mixcl shards build` reads: `python own_source.py OUT`.

The cheapest way in is not code inside the package: write NIfTI and a JSON list once. The list says which classes were
looked for in each case (`annotated`), so that "not annotated" is never taken for "not there".
"""

import json
import sys
from pathlib import Path

import nibabel as nib
import numpy as np

from mixcl_dist.data_shards.building.build import build
from mixcl_dist.data_shards.building.settings import BuildConfig
from mixcl_dist.data_shards.sources import open_source
from mixcl_dist.phantom import CLASSES, draw_torso

SPACING_MM = 9.0


def own_scans(count: int):
    """Yields name, HU (X, Y, Z), labels (X, Y, Z) or None, 4 × 4 affine in mm (RAS+): put your reader here."""
    for number in range(count):
        hu, label = draw_torso((40, 34, 40), SPACING_MM, np.random.default_rng(number))
        yield f"scan{number}", hu, label if number % 2 == 0 else None, np.diag([SPACING_MM] * 3 + [1.0])


def main(out: Path) -> None:
    out.mkdir(parents=True)
    entries = []
    for name, hu, label, affine in own_scans(4):
        nib.save(nib.Nifti1Image(hu.astype(np.int16), affine), out / f"{name}.nii.gz")
        entries.append({"image": f"{name}.nii.gz"})
        if label is not None:
            nib.save(nib.Nifti1Image(label, affine), out / f"{name}_label.nii.gz")
            entries[-1] |= {"label": f"{name}_label.nii.gz", "annotated": ["liver", "spleen"]}
    labels = {"0": "background"} | {str(value): name for value, name in enumerate(CLASSES, 1)}
    content = {"name": "mine", "modality": {"0": "CT"}, "labels": labels, "training": entries}
    (out / "dataset.json").write_text(json.dumps(content, indent=1))

    source = open_source(out / "dataset.json")
    print(f"{len(source.cases)} cases, {sum(bool(case.labels) for case in source.cases)} with labels")
    result = build([out / "dataset.json"], out / "shards", BuildConfig(patch_size=(24, 24, 24)))
    print(f"{result.manifest.patches} patches; quarantined: {[str(problem) for problem in result.quarantined]}")


if __name__ == "__main__":
    main(Path(sys.argv[1]))
