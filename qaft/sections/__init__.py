"""The sections of a recipe as frozen types: unknown keys are refused, and nothing here imports torch.

Sections with a ``kind`` (``update``, ``select``, ``gradient``, ``regularize``) hold free options that are checked
against the constructor of the registered class when the run is built, so that an option is declared and documented
once.
"""

from __future__ import annotations

from qaft.sections.base import DTypeName, KindSection, Section
from qaft.sections.data import ClassificationSection, DataSection, class_name
from qaft.sections.export import ExportSection
from qaft.sections.model import ModelSection, SelectSection, Storage, UpdateSection
from qaft.sections.qat import (
    CODE_BOOK_KINDS,
    ActivationSection,
    GridSection,
    KVCacheSection,
    QatSection,
    RotatedSection,
    Ste,
)
from qaft.sections.train import OptimSection, TrainSection

__all__ = [
    "CODE_BOOK_KINDS",
    "ActivationSection",
    "ClassificationSection",
    "DTypeName",
    "DataSection",
    "ExportSection",
    "GridSection",
    "KVCacheSection",
    "KindSection",
    "ModelSection",
    "OptimSection",
    "QatSection",
    "RotatedSection",
    "Section",
    "SelectSection",
    "Ste",
    "Storage",
    "TrainSection",
    "UpdateSection",
    "class_name",
]
