from pathlib import Path

import numpy as np
import pydicom
import pytest
from pydicom.uid import generate_uid


@pytest.fixture
def film():
    """Writes a DICOM radiograph with the elements that are given."""
    def write(path: Path, seed: int, **elements: str) -> None:
        """A DICOM file of noise at different scales, so that no two are near-duplicates."""
        random = np.random.default_rng(seed)
        coarse = np.kron(random.integers(0, 4096, (8, 8)), np.ones((12, 12)))
        pixels = (coarse + random.integers(0, 300, (96, 96))).astype(np.uint16)
        dataset = pydicom.Dataset()
        dataset.file_meta = pydicom.dataset.FileMetaDataset()
        dataset.file_meta.TransferSyntaxUID = pydicom.uid.ExplicitVRLittleEndian
        dataset.SOPClassUID, dataset.SOPInstanceUID = "1.2.840.10008.5.1.4.1.1.1", generate_uid()
        dataset.Modality, dataset.PhotometricInterpretation, dataset.SamplesPerPixel = "CR", "MONOCHROME2", 1
        dataset.Rows, dataset.Columns = pixels.shape
        dataset.BitsAllocated, dataset.BitsStored, dataset.HighBit, dataset.PixelRepresentation = 16, 16, 15, 0
        dataset.PixelData = pixels.tobytes()
        for name, value in elements.items():
            setattr(dataset, name, value)
        path.parent.mkdir(parents=True, exist_ok=True)
        dataset.save_as(path, enforce_file_format=True)

    return write
