"""Write the trained model in formats that others load, and prove it: adding a format is one file and one line here."""

from qaft.export.base import Exporter, ExportInfo, ExportReport
from qaft.export.bnb import export_bnb
from qaft.export.compressed import export_compressed
from qaft.export.dense import export_merged
from qaft.export.gguf import export_gguf
from qaft.export.gptq import export_gptq
from qaft.export.patch import export_patch
from qaft.export.peft import export_peft

EXPORTERS: dict[str, Exporter] = {
    "bnb": export_bnb,
    "compressed-tensors": export_compressed,
    "gguf": export_gguf,
    "gptq": export_gptq,
    "merged": export_merged,
    "patch": export_patch,
    "peft": export_peft,
}

__all__ = ["EXPORTERS", "ExportInfo", "ExportReport", "Exporter"]
