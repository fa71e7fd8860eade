"""Write the trained model in formats that others load, and prove it: adding a format is one file and one line here."""

from qaft.export.base import Exporter, ExportInfo, ExportReport
from qaft.export.compressed import export_compressed
from qaft.export.dense import export_merged
from qaft.export.peft import export_peft

EXPORTERS: dict[str, Exporter] = {
    "compressed-tensors": export_compressed,
    "merged": export_merged,
    "peft": export_peft,
}

__all__ = ["EXPORTERS", "ExportInfo", "ExportReport", "Exporter"]
