"""The one place that imports ONNX Runtime, without its telemetry. Standard library only, until it does.

From 1.29 on, ONNX Runtime's packages contain an uploader: on import it writes a device id and a database of events
(processor, system, interpreter, models loaded, run times) below the user's cache folder, and seconds later looks up its
collector's host. A device that runs a model must do nothing of the kind. ONNX Runtime reads its variable once, when it
is imported, so every import of it in this repository goes through here.
Source: "Disabling Telemetry" in the Privacy.md of its packages.
"""

from __future__ import annotations

import os
from collections.abc import Iterable
from typing import Any

from runtime.errors import SetupError, install

ORT = "ORT_DISABLE_TELEMETRY"
# variable -> (value that stops a library from reporting, value by which a person allows it)
SWITCHES = {
    ORT: ("1", "0"),
    "HF_HUB_DISABLE_TELEMETRY": ("1", "0"),  # huggingface_hub, Transformers: what each request says of this machine
    "HF_UPDATE_DOWNLOAD_COUNTS": ("0", "1"),  # datasets: a request for each data set that is loaded, to count it
}


def no_telemetry(names: Iterable[str] = tuple(SWITCHES)) -> None:
    """Stop libraries that are not imported yet from reporting, in this process and in those that it starts.

    Only a person's own permission is kept, such as ORT_DISABLE_TELEMETRY=0.
    """
    for name in names:
        off, allowed = SWITCHES[name]
        if os.environ.get(name) != allowed:
            os.environ[name] = off


def import_onnxruntime(device: str = "cpu") -> Any:
    """The package onnxruntime. device: names the extra in the SetupError that is raised where it is missing."""
    no_telemetry([ORT])
    try:
        import onnxruntime
    except ImportError as error:
        hint = install("cuda" if device == "cuda" else "cpu")
        raise SetupError(f"onnxruntime cannot be imported ({error}): {hint}") from error
    if os.environ[ORT] == SWITCHES[ORT][0]:  # for Windows, and where another program has imported it before
        onnxruntime.disable_telemetry_events()
    return onnxruntime
