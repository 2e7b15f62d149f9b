"""Command line and ONNX export of Dynamic Multiple Path Transformers. Importing the package imports nothing heavy."""

from __future__ import annotations

__version__ = "0.1.0"
