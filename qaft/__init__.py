"""qaft: fine-tune 4/8-bit language models through the quantizer they are served with, and export exactly that model."""

__version__ = "0.1.0"
