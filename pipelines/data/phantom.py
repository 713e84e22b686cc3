"""Phantom thorax: synthetic frontal chest radiographs with exact ground truth.

Anatomy is a set of analytic shapes in centimetres (x grows to image right, the patient's left; y grows downwards; the
origin is the detector centre).  Each tissue yields a path-length map, the maps are projected by the Beer-Lambert law,
and scatter, quantum noise and a radiographic display curve follow.  Anatomy and pathology are drawn without reference
to the image size, so one (seed, index) is the same film at every size; only the noise grain differs.
"""

from dataclasses import dataclass
from functools import lru_cache
from types import SimpleNamespace

import numpy as np

from cluster.errors import UserError

LABELS = ("opacity", "effusion", "cardiomegaly")
PREVALENCE = {"opacity": 0.45, "effusion": 0.2, "cardiomegaly": 0.25}
STUDIES_PER_PATIENT = 4
MIN_SIZE = 16

DETECTOR_CM = 35.0
"""Side of the square field of view, the 35 cm side of a standard chest cassette."""

# Linear attenuation at 60 keV in 1/cm: NIST XCOM mass coefficients (water 0.206, lung 0.205, cortical bone 0.315 cm2/g)
# times the densities of water, inflated lung (ICRP-23, 0.26 g/cm3) and cortical bone (ICRU-44, 1.92 g/cm3).
MU_SOFT, MU_LUNG, MU_BONE = 0.206, 0.053, 0.605

CARDIOTHORACIC_RATIO = {False: (0.41, 0.48), True: (0.57, 0.67)}
"""Heart width over inner thoracic width without and with cardiomegaly; the radiological cut-off is 0.5."""

# Uniform ranges of adult anatomy; lengths in cm, `heart_tilt` in radians, `arm` a slope, `bone` a relative density.
PATIENT_RANGES = {
    "scale": (0.92, 1.1), "cage": (12.3, 14.6), "apex": (-15.0, -13.2), "dome": (6.0, 9.0), "dome_gap": (0.5, 1.8),
    "lung_depth": (12.5, 16.0), "wall": (4.5, 7.5), "fat": (2.0, 4.2), "rib_pitch": (2.5, 3.0),
    "rib_radius": (0.42, 0.58), "rib_drop": (8.0, 11.0), "bone": (0.85, 1.4), "heart_tilt": (0.45, 0.75),
    "knob": (1.0, 1.9), "clavicle": (-0.1, 0.3), "arm": (0.05, 0.4),
}  # fmt: skip

# Uniform ranges of positioning, breathing and exposure; cm, radians, and natural log of photons per cm2 (`fluence`).
STUDY_RANGES = {
    "shift_x": (-1.2, 1.2), "shift_y": (0.3, 2.3), "angle": (-0.06, 0.06), "magnification": (0.96, 1.04),
    "inspiration": (-1.2, 1.0), "fluence": (13.6, 15.2), "scatter": (0.15, 0.45), "equalise": (0.15, 0.4),
    "base": (0.12, 0.24), "gamma": (0.75, 1.0), "gas": (0.0, 3.5), "fluid_height": (2.0, 6.0),
}  # fmt: skip

BLOB_RANGES = ((-13.0, 13.0), (-11.0, 8.0), (2.0, 3.8), (0.4, 0.7))
"""Consolidation candidates: x, y and radius in cm, and the fraction of air replaced by fluid at the centre."""

RIB_PAIRS = 11
SCATTER_CM = 3.5
EQUALISE_CM = 5.0
TEXTURE_KNOTS = 20


@dataclass(frozen=True)
class Phantom:
    """One radiograph: `image` uint8 (size, size), masks bool (size, size).

    `lungs` are the whole lung fields, consolidated or fluid-filled parts included, outside the heart silhouette; `left`
    is the patient's left half of the picture.
    """

    image: np.ndarray
    lungs: np.ndarray
    left: np.ndarray
    heart: np.ndarray
    labels: tuple[str, ...]
    patient_id: str
    study_id: str


def render(seed: int, index: int, size: int = 64) -> Phantom:
    """Render film `index` of the endless series `seed`; every run of STUDIES_PER_PATIENT indices is one patient."""
    if size < MIN_SIZE:
        raise UserError(f"phantom size must be at least {MIN_SIZE} pixels, got {size}")
    if index < 0:
        raise UserError(f"phantom index must not be negative, got {index}")
    patient, study = _draw_film(seed, index)
    anatomy = _Anatomy(patient, study, *_patient_frame(patient, study, size))
    grain = np.random.default_rng([seed, *divmod(index, STUDIES_PER_PATIENT), size])
    image = _display(_expose(_attenuation(anatomy), study, grain), anatomy.lungs, study)
    return Phantom(image, anatomy.lungs, anatomy.left > 0, anatomy.heart, *_identity(seed, index, patient, study))


def describe(seed: int, index: int) -> tuple[tuple[str, ...], str, str]:
    """Labels, patient and study of a film, without rendering it."""
    return _identity(seed, index, *_draw_film(seed, index))


def _identity(
    seed: int, index: int, patient: SimpleNamespace, study: SimpleNamespace
) -> tuple[tuple[str, ...], str, str]:
    labels = tuple(name for name in LABELS if getattr(patient if name == "cardiomegaly" else study, name))
    number, order = divmod(index, STUDIES_PER_PATIENT)
    patient_id = f"phantom-{seed}-{number:06d}"
    return labels, patient_id, f"{patient_id}-{order}"


def _draw_film(seed: int, index: int) -> tuple[SimpleNamespace, SimpleNamespace]:
    number, order = divmod(index, STUDIES_PER_PATIENT)
    patient = _draw_patient(np.random.default_rng([seed, number]))
    return patient, _draw_study(np.random.default_rng([seed, number, order + 1]))


def _draw(rng: np.random.Generator, ranges: dict[str, tuple[float, float]]) -> SimpleNamespace:
    low, high = np.array(list(ranges.values())).T
    return SimpleNamespace(**dict(zip(ranges, rng.uniform(low, high).tolist(), strict=True)))


def _draw_patient(rng: np.random.Generator) -> SimpleNamespace:
    patient = _draw(rng, PATIENT_RANGES)
    patient.cardiomegaly = bool(rng.random() < PREVALENCE["cardiomegaly"])
    patient.ratio = rng.uniform(*CARDIOTHORACIC_RATIO[patient.cardiomegaly])
    patient.breast = rng.uniform(1.0, 3.0) if rng.random() < 0.5 else 0.0
    patient.vessels = rng.uniform(0.0, 2 * np.pi, 3).tolist()
    patient.texture = rng.normal(size=(TEXTURE_KNOTS, TEXTURE_KNOTS))
    return patient


def _draw_study(rng: np.random.Generator) -> SimpleNamespace:
    study = _draw(rng, STUDY_RANGES)
    study.opacity = bool(rng.random() < PREVALENCE["opacity"])
    study.effusion = bool(rng.random() < PREVALENCE["effusion"])
    study.fluid_sides = (-1, 1) if rng.random() < 0.15 else (int(rng.choice((-1, 1))),)
    low, high = np.array(BLOB_RANGES).T
    study.blobs = rng.uniform(low, high, (48, 4))
    study.blob_count = int(rng.integers(1, 4))
    study.texture = rng.normal(size=(TEXTURE_KNOTS, TEXTURE_KNOTS))
    return study


@lru_cache(maxsize=16)
def _axis(count: int) -> np.ndarray:
    """Centres of `count` even cells along a detector side, cm, float32 (count,)."""
    return (((np.arange(count) + 0.5) / count - 0.5) * DETECTOR_CM).astype(np.float32)


@lru_cache(maxsize=16)
def _kernel(size: int, knots: int, sigma: float) -> np.ndarray:
    """Gaussian weights (size, knots) from `knots` even positions to pixels, rows summing to one; `sigma` in cm."""
    weights = np.exp(-0.5 * ((_axis(size)[:, None] - _axis(knots)) / sigma) ** 2)
    return weights / weights.sum(axis=1, keepdims=True)


def _blur(image: np.ndarray, sigma: float) -> np.ndarray:
    kernel = _kernel(len(image), len(image), sigma)
    return kernel @ image @ kernel.T


def _texture(knots: np.ndarray, size: int) -> np.ndarray:
    """Smooth random field (size, size) of about unit variance from square normal deviates."""
    kernel = _kernel(size, len(knots), 0.6 * DETECTOR_CM / len(knots))
    return 2.1 * (kernel @ knots.astype(np.float32) @ kernel.T)


def _inside(depth: np.ndarray, softness: float) -> np.ndarray:
    """Coverage in 0..1 of a shape at signed depth `depth` cm, ramping over `softness` cm."""
    return np.clip(depth / softness + 0.5, 0.0, 1.0)


def _chord(offset_squared: np.ndarray) -> np.ndarray:
    """Relative path length through an ellipse at squared relative offset from its centre."""
    return np.sqrt(np.maximum(1.0 - offset_squared, 0.0))


def _patient_frame(patient: SimpleNamespace, study: SimpleNamespace, size: int) -> tuple[np.ndarray, np.ndarray]:
    """Pixel centres (size, size) in the patient's cm, undoing shift, rotation and magnification."""
    zoom = 1.0 / (patient.scale * study.magnification)
    cos, sin = zoom * float(np.cos(study.angle)), zoom * float(np.sin(study.angle))
    x, y = _axis(size)[None, :] - study.shift_x, _axis(size)[:, None] - study.shift_y
    return cos * x + sin * y, cos * y - sin * x


class _Anatomy:
    """Organ geometry of one patient in one study at points (x, y), cm, of any common shape.

    `across` is the distance from the midline relative to the cage's half width `cage`; `dome` is the height of the
    diaphragm; `cavity` is the depth inside the pleural cavities; `heart_offset` is one on the heart's border.
    """

    def __init__(self, patient: SimpleNamespace, study: SimpleNamespace, x: np.ndarray, y: np.ndarray) -> None:
        self.patient, self.study, self.x, self.y = patient, study, x, y
        self.lateral = np.abs(x)
        self.left = (x > 0).astype(x.dtype)
        self.dome_height = patient.dome + study.inspiration
        crown = self.lateral - 6.0 - self.left
        self.dome = self.dome_height + patient.dome_gap * self.left + crown * (0.055 * crown + 0.025 * np.abs(crown))
        self.cage = self._cage_half_width()
        self.across = np.minimum(self.lateral / np.maximum(self.cage, 0.5), 1.1)
        self.heart_offset, self.heart_depth = self._heart()
        self.cavity = self._cavity()
        self.heart = (self.heart_offset < 1.0) & (y < self.dome + 1.0)
        self.lungs = (self.cavity > 0.0) & ~self.heart

    def _cage_half_width(self) -> np.ndarray:
        patient = self.patient
        rise = (3.5 - self.y) / (3.5 - patient.apex)
        upper = np.clip(rise, 0.0, 1.0)
        return patient.cage * np.sqrt(1.0 - upper * upper * upper) * (1.0 + 0.1 * np.minimum(rise, 0.0))

    def _heart(self) -> tuple[np.ndarray, float]:
        """Squared elliptic radius about the heart (one on its border) and its antero-posterior depth in cm."""
        tilt, slim = self.patient.heart_tilt, 0.74
        cos, sin = float(np.cos(tilt)), float(np.sin(tilt))
        half = self.patient.ratio * self.patient.cage
        axis = half / float(np.hypot(cos, slim * sin))
        floor = self.dome_height + self.patient.dome_gap + 1.4
        dx, dy = self.x - 0.37 * half, self.y - (floor - axis * float(np.hypot(sin, slim * cos)))
        along, over = (cos * dx + sin * dy) / axis, (cos * dy - sin * dx) / (slim * axis)
        return along * along + over * over, 1.9 * axis

    def _cavity(self) -> np.ndarray:
        """Signed depth (cm) in the pleural cavities: within the cage, above the diaphragm, beside the mediastinum."""
        apex = self.patient.apex
        down = self.y - apex
        knob = self.patient.knob * np.exp(-(((down - 6.5) / 1.6) ** 2)) + 0.9 * np.exp(-(((down - 10.0) / 1.7) ** 2))
        vena_cava = 0.6 * np.exp(-(((down - 8.0) / 4.0) ** 2))
        border = 2.0 + np.where(self.left, knob, vena_cava) + 3.2 * np.exp(np.clip((1.0 - down) * 0.7, -9.0, 1.0))
        within = np.minimum(self.cage - self.lateral, self.dome - self.y)
        return np.minimum(within, self.lateral - border)


def _body(a: _Anatomy) -> np.ndarray:
    """Antero-posterior thickness (cm) of torso, neck, arms and breasts."""
    patient = a.patient
    outer = np.maximum(a.lateral - 5.5, 0.0)
    slope = patient.apex - 2.0 + 0.22 * outer - 4.5 * np.exp(-0.4 * outer)
    axilla = np.clip((-2.0 - a.y) / 8.0, 0.0, 1.0)
    half = patient.cage + patient.fat + 4.0 * axilla * axilla * (3.0 - 2.0 * axilla)
    thickness = patient.lung_depth + patient.wall
    torso = thickness * np.sqrt(_chord((a.lateral / half) ** 2)) * np.sqrt(_inside(a.y - slope - 2.5, 5.0))
    neck = 11.0 * _chord((a.lateral / 6.4) ** 2) * _inside(-8.0 - a.y, 4.0)
    axis = patient.cage + patient.fat + 3.0 + patient.arm * (a.y + 9.0)
    arm = 9.0 * _chord(((a.lateral - axis) / 4.4) ** 2) * _inside(a.y - slope, 2.0)
    breast = patient.breast * _chord(((a.lateral - 7.5) / 6.0) ** 2 + ((a.y - 3.0) / 6.0) ** 2) ** 2
    return np.maximum(np.maximum(torso, neck), arm) + breast


def _ribs(a: _Anatomy, arch: np.ndarray, front: bool) -> np.ndarray:
    """Bone path (cm) of the posterior or anterior arcs of helical ribs; `arch` is the cosine of the cage angle."""
    patient = a.patient
    drop = 0.5 * patient.rib_drop * np.maximum(a.cage / patient.cage, 0.4)
    height = a.y - patient.apex - drop * (1.0 + arch if front else 1.0 - arch)
    level = height / patient.rib_pitch
    nearest = np.clip(np.round(level), 0, RIB_PAIRS - 1)
    slope = np.minimum(drop * a.across / (np.maximum(arch, 0.25) * np.maximum(a.cage, 3.0)), 1.6)
    offset = np.abs(level - nearest) * patient.rib_pitch / np.sqrt(1.0 + slope * slope)
    radius = patient.rib_radius * (1.15 if front else 1.0)
    shell = 0.3 + 0.2 * (offset / radius) ** 2
    start = 0.42 if front else 0.1
    extent = _inside(1.02 - a.across, 0.06) * _inside(a.across - start, 0.1) * _inside(a.cage - 5.5, 3.0)
    return (0.55 if front else 1.0) * shell * _inside(radius - offset, 0.25) * extent / np.maximum(arch, 0.5)


def _bones(a: _Anatomy) -> np.ndarray:
    """Cortical-equivalent bone path (cm) of ribs, spine, clavicles, scapulae and humeri."""
    patient = a.patient
    arch = _chord((0.98 * a.across) ** 2)
    ribs = _ribs(a, arch, front=False) + _ribs(a, arch, front=True)
    disc = np.cos(a.y * (2 * np.pi / patient.rib_pitch))
    spine = _inside(1.8 + 0.15 * disc - a.lateral, 0.6) * (0.6 + 0.25 * np.minimum(disc + 0.6, 0.5))
    bend = a.lateral - 9.0
    offset = a.y - (patient.apex + 3.4 - patient.clavicle * bend - 0.004 * bend * bend * bend)
    span = _inside(a.lateral - 2.2, 0.8) * _inside(16.5 - a.lateral, 1.0)
    clavicle = 0.8 * _inside(0.62 - np.abs(offset), 0.5) * span
    border = a.lateral - (patient.cage - 2.2 + 0.28 * (a.y + 6.0))
    scapula = _inside(border, 0.6) * _inside(17.0 - a.lateral, 1.0) * _inside(6.0 - np.abs(a.y + 5.5), 3.0)
    shaft = a.lateral - (patient.cage + patient.fat + 3.0 + patient.arm * (a.y + 9.0))
    head = 2.3 - np.sqrt(shaft * shaft + (a.y - patient.apex - 3.5) ** 2)
    humerus = np.maximum(_inside(head, 0.5), _inside(1.1 - np.abs(shaft), 0.4) * _inside(a.y - patient.apex - 3.5, 1.0))
    scapula *= 0.15 + 0.3 * _inside(0.8 - border, 0.3)
    return patient.bone * (ribs + spine + clavicle + scapula + 0.7 * humerus)


def _vessels(a: _Anatomy, lung: np.ndarray) -> np.ndarray:
    """Blood path (cm) of the pulmonary vessels: rays from each hilum, forked twice by folding the angle."""
    phase = a.patient.vessels
    dx, dy = a.lateral - 2.4, a.y - (a.patient.apex + 11.0 - 1.0 * a.left)
    radius = np.sqrt(dx * dx + dy * dy)
    turn = np.arctan2(dy, dx) + 0.08 * np.sin(0.7 * radius + phase[0]) + phase[1] + phase[2] * a.left
    rays = 9.0
    fold = np.abs((turn * (rays / (2 * np.pi))) % 1.0 - 0.5)
    fold = np.abs(fold - 0.035 * np.clip(radius - 2.0, 0.0, 6.0))
    fold = np.abs(fold - 0.02 * np.clip(radius - 5.0, 0.0, 5.0))
    offset = fold * radius * (2 * np.pi / rays)
    width = 0.2 + 0.45 * np.exp(-0.3 * radius)
    hilum = 2.2 * np.exp(-0.25 * radius * radius)
    return np.minimum(lung, 3.2 * width * np.maximum(1.0 - offset / (1.4 * width), 0.0) + hilum)


def _fluid_fraction(a: _Anatomy) -> np.ndarray:
    """Share of the lung path filled by consolidation and by pleural fluid, 0..1."""
    study = a.study
    air = np.ones_like(a.y)
    if study.opacity:
        ragged = np.exp(0.5 * _texture(study.texture, len(a.y)))
        for x, y, radius, filled in _consolidations(a.patient, study):
            dx, dy = (a.x - x) / radius, (a.y - y) / radius
            air *= 1.0 - filled * np.exp(-0.7 * ragged * (dx * dx + dy * dy))
    if study.effusion:
        for side in study.fluid_sides:
            meniscus = 3.0 * np.exp(np.minimum(a.lateral - a.cage, 0.0) * 0.45)
            surface = a.dome_height + 2.5 - study.fluid_height - meniscus
            air *= 1.0 - 0.8 * _inside(a.y - surface, 1.2) * (a.left == (side > 0))
    return 1.0 - air


def _consolidations(patient: SimpleNamespace, study: SimpleNamespace) -> list[list[float]]:
    """The first drawn blobs, rows as in BLOB_RANGES, whose centres lie well inside a lung field."""
    at = _Anatomy(patient, study, study.blobs[:, 0], study.blobs[:, 1])
    return study.blobs[(at.cavity > 1.8) & (at.heart_offset > 1.3)][: study.blob_count].tolist()


def _attenuation(a: _Anatomy) -> np.ndarray:
    """Line integral of linear attenuation (size, size) through body, lungs, mediastinum and bones."""
    patient = a.patient
    border = 0.55 * _inside(a.cavity, 0.7) + 0.45 * _inside(a.cavity - 1.0, 2.5)
    chest = patient.lung_depth * _chord((0.97 * a.across) ** 2) * border
    lung = np.maximum(chest - a.heart_depth * _chord(a.heart_offset), 0.1 * chest)
    lung = lung * (1.0 - _fluid_fraction(a))
    lung = lung - _vessels(a, lung)
    trachea = 1.8 * _chord((a.x / 1.0) ** 2) * _inside(patient.apex + 9.0 - a.y, 2.0)
    gas = a.study.gas * _chord(((a.x - 6.0) / 2.6) ** 2 + ((a.y - a.dome - 2.2) / 1.5) ** 2)
    body = _body(a) * (1.0 + 0.025 * _texture(patient.texture, len(a.y)))
    soft = np.maximum(body - lung - trachea - gas, 0.0)
    return MU_SOFT * soft + MU_LUNG * lung + (MU_BONE - MU_SOFT) * _bones(a)


def _expose(line_integral: np.ndarray, study: SimpleNamespace, rng: np.random.Generator) -> np.ndarray:
    """Log attenuation (size, size) read off a detector with scatter from the body and Poisson quantum noise."""
    primary = np.exp(-line_integral)
    signal = primary + study.scatter * _blur(np.minimum(primary, 0.25), SCATTER_CM)
    photons = np.exp(study.fluence) * (DETECTOR_CM / len(signal)) ** 2
    counts = rng.poisson(signal * photons)
    return -np.log(np.maximum(counts, 1) / photons).astype(np.float32)


def _display(log_attenuation: np.ndarray, lungs: np.ndarray, study: SimpleNamespace) -> np.ndarray:
    """8-bit film look (bone white, lung dark): large-area equalisation, then a window anchored on the lung fields."""
    flat = log_attenuation - study.equalise * _blur(log_attenuation, EQUALISE_CM)
    dark, bright = np.percentile(flat[lungs], 5), np.percentile(flat, 99)
    grey = study.base + (0.96 - study.base) * (flat - dark) / (bright - dark)
    return np.rint(255.0 * np.clip(grey, 0.0, 1.0) ** study.gamma).astype(np.uint8)
