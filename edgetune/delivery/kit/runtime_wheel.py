"""The runtime's own wheel, made from the package that is imported here, installed or editable alike."""

from __future__ import annotations

import base64
import hashlib
from importlib.metadata import distribution
from pathlib import Path

import edgetune_runtime
from edgetune_runtime.errors import IncompatibleError

from .archives import zip_bytes

DISTRIBUTION = "edgetune-runtime"
_METADATA = ("METADATA", "entry_points.txt")
_WHEEL = """\
Wheel-Version: 1.0
Generator: edgetune
Root-Is-Purelib: true
Tag: py3-none-any
"""


def runtime_wheel() -> tuple[str, bytes]:
    """Name and bytes of the wheel; the same package gives the same bytes.

    IncompatibleError if the metadata is of another version than the package, as after a change in an editable install.
    """
    installed = distribution(DISTRIBUTION)
    if installed.version != edgetune_runtime.__version__:
        message = f"{DISTRIBUTION} {installed.version} is installed, but {edgetune_runtime.__version__} is imported"
        raise IncompatibleError(message, f"install {DISTRIBUTION} again")
    package = Path(*edgetune_runtime.__path__)
    name = f"{edgetune_runtime.__name__}-{installed.version}"
    info = f"{name}.dist-info"
    paths = sorted(path for path in package.rglob("*") if path.is_file() and "__pycache__" not in path.parts)
    contents = {path.relative_to(package.parent).as_posix(): path.read_bytes() for path in paths}
    contents |= {f"{info}/{part}": text.encode() for part in _METADATA if (text := installed.read_text(part))}
    contents[f"{info}/WHEEL"] = _WHEEL.encode()
    for path in installed.files or ():
        if path.parent.name == "licenses":
            contents[f"{info}/licenses/{path.name}"] = path.read_binary()
    lines = [f"{path},sha256={_digest(data)},{len(data)}" for path, data in contents.items()]
    record = f"{info}/RECORD"
    contents[record] = "\n".join([*lines, f"{record},,", ""]).encode()
    return f"{name}-py3-none-any.whl", zip_bytes(contents)


def _digest(data: bytes) -> str:
    return base64.urlsafe_b64encode(hashlib.sha256(data).digest()).rstrip(b"=").decode()
