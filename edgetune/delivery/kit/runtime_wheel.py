"""The runtime's own wheel, made from the package that is imported here, installed or editable alike."""

from __future__ import annotations

from importlib.metadata import distribution
from pathlib import Path

import edgetune_runtime
from edgetune_runtime.errors import IncompatibleError

from edgetune.delivery.wheel.wheel_file import wheel_bytes

DISTRIBUTION = "edgetune-runtime"
_METADATA = ("METADATA", "entry_points.txt")
_HEAD = "Generator: edgetune\nRoot-Is-Purelib: true\nTag: py3-none-any\n"


def runtime_wheel() -> tuple[str, bytes]:
    """Name and bytes of the wheel; the same package gives the same bytes.

    IncompatibleError if the metadata is of another version than the package, as after a change in an editable install.
    """
    installed = distribution(DISTRIBUTION)
    if installed.version != edgetune_runtime.__version__:
        message = f"{DISTRIBUTION} {installed.version} is installed, but {edgetune_runtime.__version__} is imported"
        raise IncompatibleError(message, f"install {DISTRIBUTION} again")
    package = Path(*edgetune_runtime.__path__)
    paths = (path for path in package.rglob("*") if path.is_file() and "__pycache__" not in path.parts)
    files = {path.relative_to(package.parent).as_posix(): path.read_bytes() for path in paths}
    metadata = {part: text.encode() for part in _METADATA if (text := installed.read_text(part))}
    licenses = (path for path in installed.files or () if path.parent.name == "licenses")
    metadata |= {f"licenses/{path.name}": path.read_binary() for path in licenses}
    name = f"{edgetune_runtime.__name__}-{installed.version}"
    return f"{name}-py3-none-any.whl", wheel_bytes(files, metadata, f"{name}.dist-info", _HEAD)
