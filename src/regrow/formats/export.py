"""`regrow.export`: a checkpoint to padded layers, GGUF or ONNX."""

import subprocess
import sys
import tempfile
from importlib import import_module
from pathlib import Path
from typing import Any, Literal, get_args

from regrow.checkpoint.files import storage_errors
from regrow.checkpoint.load import load_model
from regrow.checkpoint.lock import alone_in_new, alone_with
from regrow.errors import InputError
from regrow.formats.pad import pad_checkpoint
from regrow.formats.source import Checkpoint, model_name

Format = Literal["gguf", "onnx"]


def export(
    folder: str | Path,
    out: str | Path,
    to: Format | None = None,
    *,
    pad: bool = False,
    multiple: int = 1,
    kind: str = "auto",
    converter: str | Path | None = None,
    trust_remote_code: bool = False,
) -> dict[str, Any]:
    """Write a checkpoint for other programs.

    Args:
        folder: a checkpoint's folder, or that of a run.
        out: a folder, new or empty; for GGUF a file.
        to: gguf, onnx, or None for a Hugging Face checkpoint (with `pad`).
        pad: make uneven layers equal with zeros first: every stock class and engine takes them then.
        multiple: round the padded FFN width up to a multiple of this.
        kind: the GGUF file's type; see `regrow.formats.llamacpp.TYPES` and `K_TYPES`.
        converter: llama.cpp's convert_hf_to_gguf.py, to write the GGUF file instead of regrow.
        trust_remote_code: run the modeling file of uneven layers, which ONNX needs without `pad`.

    Returns:
        Plain data: what was written, and how.

    Raises:
        InputError: if something given cannot work, an extra is not installed, or another process writes there.
    """
    if to not in (None, *get_args(Format)):
        raise InputError(f"--to {to!r}: choose gguf or onnx")
    if multiple < 1:
        raise InputError(f"export: --multiple {multiple}: give at least 1")
    place, source = Path(out), Checkpoint(Path(folder))
    if to is None and not pad:
        raise InputError("export: say what to write: --to gguf, --to onnx, or --pad")
    if (kind != "auto" or converter) and to != "gguf":
        raise InputError("export: --type and --converter go with --to gguf")
    if multiple != 1 and not pad:
        raise InputError("export: --multiple goes with --pad")
    chosen = Path(converter) if converter is not None else None
    with storage_errors(), alone_with(place) if to == "gguf" else alone_in_new(place):
        if to is None:
            return _pad(source, place, multiple)
        # llama.cpp's converter reads stock classes only
        if pad or (chosen is not None and not source.even):
            with tempfile.TemporaryDirectory() as scratch:
                padded = Path(scratch, model_name(source.folder))
                _pad(source, padded, multiple)
                return _convert(Checkpoint(padded), place, to, kind, chosen, False) | {"padded": True}
        return _convert(source, place, to, kind, chosen, trust_remote_code)


def _convert(
    source: Checkpoint, out: Path, to: Format, kind: str, converter: Path | None, trust_remote_code: bool
) -> dict[str, Any]:
    if to == "onnx":
        return _onnx(source, out, trust_remote_code)
    return _gguf(source, out, kind, converter)


def _pad(source: Checkpoint, out: Path, multiple: int) -> dict[str, Any]:
    wide = pad_checkpoint(source, out, multiple)
    return {
        "out": str(out),
        "format": "safetensors",
        "padded": True,
        "layers": len(source.widths),
        "heads": wide.heads,
        "kv_heads": wide.kv_heads,
        "channels": wide.channels,
    }


def _gguf(source: Checkpoint, out: Path, kind: str, converter: Path | None) -> dict[str, Any]:
    if out.is_dir():
        raise InputError(f"{out} is a folder; give a file for GGUF, such as {out / 'model.gguf'}")
    if converter is not None:
        run_converter(converter, source.folder, out, kind)
        return {"out": str(out), "format": "gguf", "converter": str(converter)}
    _require("gguf", "gguf")
    from regrow.formats.llamacpp import K_TYPES, write_gguf

    if kind in K_TYPES:
        _require("llama_cpp", "gguf-check")
        from regrow.formats.llamacpp_quantise import write_quantised

        return {"out": str(out), "format": "gguf", **write_quantised(source, out, kind).to_json()}
    written = write_gguf(source, out, kind)
    return {"out": str(out), "format": "gguf", **written.to_json()}


def run_converter(converter: Path, folder: Path, out: Path, kind: str) -> None:
    """Let llama.cpp's convert_hf_to_gguf.py write the file.

    Raises:
        InputError: if there is no such file, or it fails; its last words go with it.
    """
    if not converter.is_file():
        raise InputError(f"there is no {converter}; give llama.cpp's convert_hf_to_gguf.py")
    command = [sys.executable, str(converter), str(folder), "--outfile", str(out), "--outtype", kind]
    child = subprocess.run(command, capture_output=True, text=True, check=False)
    if child.returncode:
        last = child.stderr.strip().splitlines()[-1:] or ["no message"]
        raise InputError(f"{converter.name} did not convert {folder}: {last[0]}")


def _onnx(source: Checkpoint, out: Path, trust_remote_code: bool) -> dict[str, Any]:
    for module in ("onnx", "onnxscript", "onnxruntime"):
        _require(module, "onnx")
    from regrow.formats.onnx_graph import write_onnx

    model = load_model(str(source.folder), trust_remote_code=trust_remote_code)
    graph = write_onnx(model, source.folder, out)
    return {"out": str(graph.file), "format": "onnx", "difference": graph.difference}


def _require(module: str, extra: str) -> None:
    """See that an extra is there before anything is begun.

    Raises:
        InputError: if it is not.
    """
    try:
        import_module(module)
    except ImportError as error:
        raise InputError(f"this needs {module}, which is not installed: pip install 'regrow[{extra}]'") from error
