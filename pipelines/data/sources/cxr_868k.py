"""The large mix: thirteen public chest X-ray sets, each in a folder of its `data=` name below one root.

data.root holds nih-cxr14/, chexpert/, …, each in its owner's layout; data.sets takes some of them. The owners hand out
1,090,398 images in all. Of these what cannot be decoded and what is there twice goes to quarantine (COVIDx CXR-4, of
84,818 images, is largely made of others), which leaves more than 868,000. The filter behind that number in
Dino-Diffusion (arXiv:2407.11594) is unpublished; this one is ours. data.frontal=true keeps frontal views only.
"""

from pipelines.data.sources.mix import Mix

SETS = ("nih-cxr14", "chexpert", "mimic-cxr-jpg", "padchest", "bimcv-covid19", "vindr-cxr", "vindr-pcxr", "brax",
        "covidx-cxr4", "kermany", "jsrt", "montgomery", "shenzhen")

SOURCE = Mix("cxr-868k", SETS)
