"""Which DICOM objects are chest radiographs, by their header: SOP Class, Modality, PresentationIntentType, body part.

What the header does not tell, or tells in words that are not known, is kept: absence says nothing against a film.
Films of the chest with the abdomen are kept, since they show the whole chest; those of the thoracic spine are not.
"""

from __future__ import annotations

import re
import unicodedata
from typing import TYPE_CHECKING

from pipelines.data.image.picture import Refused
from pipelines.data.settings import DataSettings

if TYPE_CHECKING:
    from pydicom import Dataset

TAGS = ("SOPClassUID", "Modality", "PresentationIntentType", "BodyPartExamined", "AnatomicRegionSequence")
RADIOGRAPHS = (  # how the names of storage classes begin in which radiographs come, Secondary Capture among them
    "Computed Radiography Image", "Digital X-Ray Image", "Secondary Capture Image", "Multi-frame Grayscale",
    "Multi-frame True Color", "Multi-frame Single Bit")
OTHER_OBJECTS = {  # defined terms of Modality that are no images, DICOM PS3.3 C.7.3.1.1.1
    "SR", "PR", "KO", "DOC", "SEG", "REG", "AU", "ECG", "EPS", "HD", "RESP", "FID", "PLAN", "RWV", "SMR", "STAIN",
    "TEXTUREMAP", "ANN", "ASMT", "HC", "OAM", "RTPLAN", "RTSTRUCT", "RTDOSE", "RTRECORD", "RTINTENT", "RTSEGANN"}
OTHER_MODALITIES = {  # defined terms of images that are not radiographs of the body, or are of other parts of it
    "CT", "MR", "PT", "NM", "US", "IVUS", "XA", "DS", "MG", "RTIMAGE", "BMD", "BDUS", "IO", "PX", "ES", "XC", "GM",
    "SM", "DMS", "DG", "EM", "OP", "OPT", "OPM", "OPV", "OPTBSV", "OPTENF", "OCT", "IVOCT", "OSS", "LEN", "KER",
    "LS", "TG", "AR", "AS", "BI", "CD", "CF", "CP", "CS", "DD", "DF", "DM", "EC", "FA", "FS", "LP", "MA", "MS", "ST",
    "VF"}
SPINE = r"spine|spinal|vertebr|columna|colonne|wirbel|\b[hbl]ws\b|scolio"
CHEST = (r"chest|thora|tora[cx]|\bcxr|lung|pulm|poumon|\brib|costal|stern|mediast|heart|coeur|cardia|pleura|brust"
         r"|\bpecho|babygram|whole ?body")
ELSEWHERE = (  # DICOM PS3.16 annex L and what devices write for it, in several languages: beginnings of words, after
    # the letter of a side or not (RHAND)
    SPINE + r"|\b(?:[rl] ?)?("
    r"abdom|abd\b|kub\b|pelv|becken|bassin|hip\b|hips\b|hufte|cadera|hanche|sacr|coccy|si ?joint|extrem"
    r"|limb|up ?ex|low ?ex|lower|upper|shoulder|schulter|hombro|epaule|clavic|scapul|humer|elbow|ellenbogen|codo|coude"
    r"|forearm|arm\b|radius|ulna|wrist|handgelenk|muneca|poignet|hand|mano\b|main\b|finger|thumb|femur|thigh|knee|knie"
    r"|rodilla|genou|patell|tibia|fibula|leg\b|legs\b|calf|ankle|tobillo|cheville|foot|feet|fuss|pie\b|pied|toe|heel"
    r"|calcan|skull|schadel|craneo|crane|head|kopf|brain|face|facial|nas(al|en)|nose|orbit|eye|jaw|mandib|maxil|tmj"
    r"|dental|teeth|tooth|sinus|neck|hals|cuello|breast|mamma|stomach|colon|bowel|esoph|bladder|kidney|uterus)")


def refuse_unwanted(header: Dataset, settings: DataSettings) -> None:
    """Raise Refused where a header says that the object is no radiograph, or not of the chest.

    Raises:
        Refused: not_an_image_object, not_a_radiograph, not_for_presentation, not_a_chest.
    """
    from pydicom.uid import UID

    meta = getattr(header, "file_meta", {})
    sop_class = UID(str(header.get("SOPClassUID") or meta.get("MediaStorageSOPClassUID") or ""))
    name = sop_class.name if sop_class.name != sop_class else ""  # of a private class there is none
    modality = str(header.get("Modality") or "").strip().upper()
    intent = str(header.get("PresentationIntentType") or "").strip().upper()
    if ("Storage" in name and "Image" not in name) or modality in OTHER_OBJECTS:
        raise Refused("not_an_image_object", f"its SOP Class is {name or 'private'}, its Modality {_known(modality)}")
    if ("Image Storage" in name and not name.startswith(RADIOGRAPHS)) or modality in OTHER_MODALITIES:
        raise Refused("not_a_radiograph", f"its SOP Class is {name or 'private'}, its Modality {_known(modality)}")
    if intent == "FOR PROCESSING" or name.endswith("For Processing"):
        raise Refused("not_for_presentation", "it is FOR PROCESSING")
    if settings.chest_only and (part := _elsewhere(header)):
        raise Refused("not_a_chest", f"its body part begins with {part!r}")


def _known(modality: str) -> str:
    return modality if modality in OTHER_OBJECTS | OTHER_MODALITIES | {"CR", "DX"} else "another"


def _elsewhere(header: Dataset) -> str | None:
    """The word of BodyPartExamined, or of AnatomicRegionSequence where that is empty, that names no part of a chest."""
    text = str(header.get("BodyPartExamined") or "")
    if not text.strip() and header.get("AnatomicRegionSequence"):
        text = str(header.AnatomicRegionSequence[0].get("CodeMeaning") or "")
    text = "".join(c for c in unicodedata.normalize("NFKD", text.lower()) if not unicodedata.combining(c))
    text = re.sub(r"[\W_]+", " ", text)
    spine, elsewhere = re.search(SPINE, text), re.search(ELSEWHERE, text)
    if elsewhere is None or (re.search(CHEST, text) and (spine is None or re.search("chest", text))):
        return None
    return elsewhere.group().strip()
