"""What was found in a CT, as files on the grid of its own files: NIfTI labels and probabilities, DICOM-SEG."""

from __future__ import annotations

import gzip
import io
import tempfile
import warnings
from collections.abc import Sequence
from contextlib import ExitStack
from pathlib import Path
from typing import Any

import nibabel as nib
import numpy as np
from torch import Tensor

from mixcl_dist import __version__
from mixcl_dist.data_shards.catalogue import sanitised
from mixcl_dist.data_shards.sources import Case
from mixcl_dist.data_shards.volume import Grid
from mixcl_dist.jsonfiles import write_atomic

STEPS = 65535
"""A probability is stored as so many parts of one, in uint16."""
GEOMETRY = (
    *("pixdim", "xyzt_units", "qform_code", "sform_code", "quatern_b", "quatern_c", "quatern_d"),
    *("qoffset_x", "qoffset_y", "qoffset_z", "srow_x", "srow_y", "srow_z"),
)
"""Of a NIfTI header, all that says where voxels lie, and nothing that may name a patient."""
COMPRESSION = 4
"""Of gzip: a label is as small as at 9, nearly, in a third of the time."""


def write_nifti(file: Path, values: np.ndarray, grid: Grid, case: Case, part: int | None = None) -> int:
    """Publish `values` (X, Y, Z) in RAS as .nii.gz in the order and place of the case's files; returns its size.

    Where these are NIfTI, the place is copied from their header, so that affines are equal. `part` says of how many
    parts of one the values are numbers; None: they are classes.
    """
    stored = grid.from_ras(values)
    source: Any = nib.load(case.files[0]).header if case.format == "nifti" else None
    kind = nib.Nifti2Image if isinstance(source, nib.Nifti2Header) else nib.Nifti1Image
    if source is None:
        image = kind(stored, grid.affine)
        image.header.set_xyzt_units("mm")
    else:
        header = kind.header_class()
        header.set_data_shape(stored.shape)
        for key in GEOMETRY:
            header[key] = source[key]
        image = kind(stored, None, header)
    image.set_data_dtype(stored.dtype)
    if part is not None:
        image.header.set_slope_inter(1 / part, 0)
    content = gzip.compress(_single(image, stored), COMPRESSION, mtime=0)
    write_atomic(file, content)
    return len(content)


def _single(image: nib.Nifti1Image, stored: np.ndarray) -> bytes:
    """The bytes of one .nii file; nibabel would divide the voxels by the header's slope."""
    header = image.header.copy()
    header["magic"] = header.single_magic
    header["vox_offset"] = header.single_vox_offset
    head = header.binaryblock
    return head + bytes(header.single_vox_offset - len(head)) + stored.tobytes(order="F")


class Probabilities:
    """Probabilities of every class of a CT, which come a few planes at a time, on disk until each class is written."""

    def __init__(self, classes: Sequence[str], shape: Sequence[int], folder: Path) -> None:
        self._classes, self._shape, self._axis = classes, tuple(shape), 0
        with ExitStack() as stack:
            self._files = [stack.enter_context(tempfile.TemporaryFile(dir=folder)) for _ in classes]
            self._open = stack.pop_all()

    def __enter__(self) -> Probabilities:
        return self

    def __exit__(self, *_: object) -> None:
        self._open.close()

    def keep(self, axis: int, number: int, planes: Tensor) -> None:
        """As `scoring.segment` calls it; the background's, 1 less all others, are not kept."""
        if number:
            self._axis = axis
            parts = (planes * STEPS).round().cpu().numpy().astype(np.uint16)
            self._files[number - 1].write(parts.tobytes())

    def write(self, folder: Path, grid: Grid, case: Case) -> dict[Path, int]:
        """A file for each class in `folder`, and its size."""
        folder.mkdir(parents=True, exist_ok=True)
        axis = self._axis
        front = [axis, *(n for n in range(3) if n != axis)]
        sizes = {}
        for number, (name, stored) in enumerate(zip(self._classes, self._files, strict=True), start=1):
            stored.seek(0)
            planes = np.frombuffer(stored.read(), np.uint16).reshape([self._shape[n] for n in front])
            file = folder / f"{number}_{sanitised(name)}.nii.gz"
            sizes[file] = write_nifti(file, planes.transpose([front.index(n) for n in range(3)]), grid, case, STEPS)
        return sizes


def write_seg(file: Path, label: np.ndarray, grid: Grid, case: Case, classes: Sequence[str], model: str) -> int:
    """Publish `label` (X, Y, Z) uint8 in RAS as a binary DICOM-SEG of the series in `case.files`; returns its size.

    It belongs to the series' study and so names its patient, as the series does. The same label of the same model has
    the same UIDs.
    """
    import highdicom
    from pydicom import dcmread
    from pydicom.uid import generate_uid

    frames = np.ascontiguousarray(grid.from_ras(label).transpose(2, 1, 0))
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # those quote header values
        slices = [dcmread(one, stop_before_pixels=True, force=True) for one in case.files]
        told = [str(slices[0].SeriesInstanceUID), model]
        written = highdicom.seg.Segmentation(
            source_images=slices,
            pixel_array=frames,
            segmentation_type=highdicom.seg.SegmentationTypeValues.BINARY,
            segment_descriptions=[_described(number, name) for number, name in enumerate(classes, start=1)],
            series_instance_uid=generate_uid(entropy_srcs=["series", *told]),
            series_number=1000,
            sop_instance_uid=generate_uid(entropy_srcs=["instance", *told]),
            instance_number=1,
            manufacturer="mixcl-dist",
            manufacturer_model_name="mixcl-dist",
            software_versions=__version__,
            device_serial_number=model[:16],
            content_label="SEGMENTATION",
            series_description="Segmentation by mixcl-dist",
        )
        stream = io.BytesIO()
        written.save_as(stream)
    write_atomic(file, stream.getvalue())
    return stream.tell()


def _described(number: int, name: str) -> Any:
    """A segment, under the code of its anatomical structure where the class has that name."""
    import highdicom
    from pydicom.sr.codedict import codes

    word = "".join(part.capitalize() for part in name.replace("-", "_").split("_"))
    structure = getattr(codes.CID7192, word) if word in codes.CID7192.dir() else codes.SCT.AnatomicalStructure
    family = codes.DCM.ArtificialIntelligence
    return highdicom.seg.SegmentDescription(
        segment_number=number,
        segment_label=name[:64],
        segmented_property_category=codes.SCT.AnatomicalStructure,
        segmented_property_type=structure,
        algorithm_type=highdicom.seg.SegmentAlgorithmTypeValues.AUTOMATIC,
        algorithm_identification=highdicom.AlgorithmIdentificationSequence(
            name="mixcl-dist", version=__version__, family=family
        ),
    )
