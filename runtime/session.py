"""An ONNX Runtime session for one model folder: options, providers, and its errors turned into ours."""

from __future__ import annotations

import os
import re
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from threading import Lock
from typing import Any
from weakref import WeakSet

from runtime.errors import ModelError, OutOfMemory, RequestError, SetupError, install, is_out_of_memory
from runtime.manifest import Manifest
from runtime.ort import import_onnxruntime
from runtime.pages import forget_files, large_pages
from runtime.processor import check_batches, check_runtime

CLOSED = "the model is closed: load it again"
DEVICES = ("cpu", "cuda")
PROVIDERS = {"cpu": "CPUExecutionProvider", "cuda": "CUDAExecutionProvider"}
SEVERITY = {"cpu": 4, "cuda": 3}  # errors are raised, but why a CUDA library does not load is only logged
NO_FALLBACK = "fallback to CPU EP has been explicitly disabled"
COLOUR = re.compile(r"\x1b\[[0-9;]*m")
UNTILED = "ORT_GQA_DISABLE_FLASH_ATTENTION"  # ONNX Runtime reads it when a session is created
ENVIRONMENT = Lock()  # the environment belongs to the process: one session at a time changes it
TYPES = {
    "tensor(float)": "float32",
    "tensor(float16)": "float16",
    "tensor(int64)": "int64",
    "tensor(int32)": "int32",
    "tensor(int8)": "int8",
    "tensor(bool)": "bool",
}


class Binding:
    """An onnxruntime.IOBinding that the engine can revoke."""

    def __init__(self, inner: Any) -> None:
        self.inner = inner

    def __getattr__(self, name: str) -> Any:
        if self.inner is None:
            raise RequestError(CLOSED)
        return getattr(self.inner, name)


class Engine:
    """A loaded graph. Several sequences, also in several threads, may share it."""

    def __init__(
        self, folder: Path, manifest: Manifest, device: str, threads: int, deterministic: bool = False
    ) -> None:
        """Raises SetupError (package or GPU), ModelError (graph), RequestError (device), OutOfMemory."""
        if device not in DEVICES:
            raise RequestError(f"unknown device {device!r}: choose one of {', '.join(DEVICES)}")
        self.manifest = manifest
        self.device = device
        self._ort = import_onnxruntime(device)
        check_runtime(self._ort.__version__, manifest, folder)
        self._errors = ort_errors(self._ort)
        self._session: Any = self._open(folder, threads, deterministic)
        self._bindings: WeakSet[Binding] = WeakSet()
        self._closing = Lock()  # no binding is created during or after close()
        self._tidy = self._ort.RunOptions()
        if device == "cpu":  # a long prompt needs ten times the memory of the steps after it
            self._tidy.add_run_config_entry("memory.enable_memory_arena_shrinkage", "cpu:0")
        check_graph(self._session, manifest, folder)

    def _open(self, folder: Path, threads: int, deterministic: bool) -> Any:
        if self.device == "cuda":
            check_cuda(self._ort, self.manifest, folder)
        path = folder / self.manifest.model
        options = session_options(self._ort, self.device, threads)
        options.use_deterministic_compute = deterministic
        try:
            with attention_kernel(self.manifest), large_pages():
                session = self._ort.InferenceSession(str(path), options, providers=[PROVIDERS[self.device]])
        except self._errors as error:
            raise explained(error, f"ONNX Runtime cannot load {path}") from error
        forget_files(folder / entry.name for entry in self.manifest.files)
        if session.get_providers()[0] != PROVIDERS[self.device]:
            raise SetupError(f"ONNX Runtime fell back to the CPU: its {self.device} libraries do not load here")
        return session

    @property
    def onnxruntime_version(self) -> str:
        return str(self._ort.__version__)

    def check_batches(self) -> None:
        """Raise SetupError where ONNX Runtime cannot run several texts of this model together."""
        check_batches(self._ort.__version__, self.manifest)

    def binding(self) -> Any:
        """A new onnxruntime.IOBinding; closing the engine revokes it."""
        with self._closing:
            binding = Binding(self._ort.IOBinding(self._alive()))
            self._bindings.add(binding)
        return binding

    def run(self, binding: Any, tidy: bool = False) -> None:
        """Run the graph on a binding; `tidy` returns the memory it needed to the system.

        Raises OutOfMemory, or ModelError for any other failure inside the graph.
        """
        try:
            self._alive().run_with_iobinding(binding, self._tidy if tidy else None)
        except self._errors as error:
            raise explained(error, "ONNX Runtime failed to run the model") from error

    def on_device(self, array: Any) -> Any:
        """An onnxruntime.OrtValue on the device with a copy of a numpy array."""
        try:
            return self._ort.OrtValue.ortvalue_from_numpy(array, self.device, 0)
        except self._errors as error:
            raise explained(error, "ONNX Runtime cannot place a cache on the GPU") from error

    def close(self) -> None:
        """Free the graph and its weights; existing sequences can no longer run."""
        with self._closing:
            self._session = None
            for binding in self._bindings:  # each also holds the graph
                binding.inner = None

    def _alive(self) -> Any:
        if self._session is None:
            raise RequestError(CLOSED)
        return self._session


def ort_errors(ort: Any) -> tuple[type[Exception], ...]:
    """All exceptions of ONNX Runtime: its own status exceptions (which share no base class) and RuntimeError."""
    state = ort.capi.onnxruntime_pybind11_state
    own = [kind for kind in vars(state).values() if isinstance(kind, type) and issubclass(kind, Exception)]
    return (*own, RuntimeError)


def explained(error: Exception, what: str) -> Exception:
    text = " ".join(COLOUR.sub(" ", str(error)).split())
    if NO_FALLBACK in text:
        return SetupError(
            f"{what} on the GPU alone: a CUDA library is missing (see onnxruntime's message above), "
            "or the model contains an operator without a CUDA kernel"
        )
    if is_out_of_memory(error):
        return OutOfMemory(f"{what}: not enough memory ({text})")
    return ModelError(f"{what}: {text}")


def session_options(ort: Any, device: str, threads: int) -> Any:
    options = ort.SessionOptions()
    options.intra_op_num_threads = threads
    options.inter_op_num_threads = 1
    options.execution_mode = ort.ExecutionMode.ORT_SEQUENTIAL
    options.graph_optimization_level = ort.GraphOptimizationLevel.ORT_ENABLE_ALL
    options.log_severity_level = SEVERITY[device]
    # Patterns are kept per input shape; pending rows and prompts have many shapes, so patterns would pile up.
    options.enable_mem_pattern = False
    if device == "cuda":
        options.add_session_config_entry("session.disable_cpu_ep_fallback", "1")
    else:  # the fused kernel takes five times as long as the two it replaces
        options.add_session_config_entry("optimization.disable_specified_optimizers", "SkipLayerNormFusion")
    return options


@contextmanager
def attention_kernel(manifest: Manifest) -> Iterator[None]:
    """Sessions created inside use untiled attention for int8 caches alone. At a context of 900 a step's attention takes
    half as long tiled as untiled over float caches, and 1.4 times as long over int8 ones (AVX-512). A setting already
    in the environment is kept."""
    with ENVIRONMENT:
        set_here = manifest.cache_dtype == "int8" and UNTILED not in os.environ
        if set_here:
            os.environ[UNTILED] = "1"
        try:
            yield
        finally:
            if set_here:
                del os.environ[UNTILED]


def check_cuda(ort: Any, manifest: Manifest, folder: Path) -> None:
    if manifest.target != "cuda":
        raise ModelError(f"{folder} was exported for {manifest.target}: use `dmpt-export onnx --target cuda`")
    if PROVIDERS["cuda"] not in ort.get_available_providers():
        raise SetupError(
            f"this onnxruntime {ort.__version__} has no CUDA: pip uninstall onnxruntime, then {install('cuda')}"
        )
    if hasattr(ort, "preload_dlls"):  # finds the CUDA libraries that pip installed
        ort.preload_dlls()


def check_graph(session: Any, manifest: Manifest, folder: Path) -> None:
    """Check that the graph's inputs and outputs match the manifest in name, type and fixed sizes."""
    problems = []
    for specs, values in ((manifest.inputs, session.get_inputs()), (manifest.outputs, session.get_outputs())):
        found = {value.name: value for value in values}
        problems += [f"{name} is not in the graph" for name in specs if name not in found]
        problems += [f"{name} is not in the manifest" for name in found if name not in specs]
        for name in specs.keys() & found.keys():
            dtype, shape = TYPES.get(found[name].type, found[name].type), tuple(found[name].shape)
            if dtype != specs[name].dtype or not same_shape(shape, specs[name].shape):
                problems.append(f"{name} is {dtype} {list(shape)}, the manifest says {list(specs[name].shape)}")
    if problems:
        raise ModelError(f"{folder / manifest.model} does not fit its manifest: {'; '.join(sorted(problems))}")


def same_shape(found: tuple[Any, ...], wanted: tuple[int | str, ...]) -> bool:
    """Whether all sizes that are fixed in both are equal."""
    pairs = list(zip(found, wanted, strict=False))
    return len(found) == len(wanted) and all(a == b for a, b in pairs if isinstance(a, int) and isinstance(b, int))
