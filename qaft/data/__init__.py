"""Data: from files to samples with a loss mask, and from samples to batches that every run sees in the same order."""

from __future__ import annotations

from qaft.data.batches import Batch, EvalBatches, TrainBatches
from qaft.data.isolation import check_isolation, check_options
from qaft.data.items import ClassificationItem, GenerationItem, classification_items, generation_items
from qaft.data.load import LoadedSamples, load_samples
from qaft.data.options import OptionsSample, load_options
from qaft.data.options_batch import OptionsBatch
from qaft.data.report import DataReport, data_report, print_report
from qaft.data.samples import IGNORE_INDEX, Sample

__all__ = [
    "IGNORE_INDEX",
    "Batch",
    "ClassificationItem",
    "DataReport",
    "EvalBatches",
    "GenerationItem",
    "LoadedSamples",
    "OptionsBatch",
    "OptionsSample",
    "Sample",
    "TrainBatches",
    "check_isolation",
    "check_options",
    "classification_items",
    "data_report",
    "generation_items",
    "load_options",
    "load_samples",
    "print_report",
]
