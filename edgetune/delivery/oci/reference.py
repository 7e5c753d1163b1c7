"""References of OCI artifacts: `oci://REGISTRY/NAME:TAG` and `oci-layout:DIR:TAG`, or `@sha256:DIGEST` for the tag."""

from __future__ import annotations

import ipaddress
import re
from dataclasses import dataclass, replace

from edgetune_runtime.errors import UsageError

from .artifact import DIGEST

_VERSION = rf"(?::(?P<tag>\w[\w.-]{{0,127}})|@{DIGEST}(?P<digest>[0-9a-f]{{64}}))"
_PART = r"[a-z0-9]+(?:(?:\.|_|__|-+)[a-z0-9]+)*"
_REGISTRY = re.compile(
    rf"(?P<scheme>oci://)(?P<place>(?:[A-Za-z0-9.-]+|\[[0-9a-fA-F:]+\])(?::\d{{1,5}})?/{_PART}(?:/{_PART})*){_VERSION}",
    re.ASCII,
)
_LAYOUT = re.compile(rf"(?P<scheme>oci-layout:)(?P<place>[^\0]+?){_VERSION}", re.ASCII)


@dataclass(frozen=True)
class Reference:
    """An artifact by its tag or by the sha256 of its manifest; `place` is HOST[:PORT]/NAME, or a layout's folder."""

    scheme: str
    place: str
    tag: str | None
    digest: str | None

    def __str__(self) -> str:
        return f"{self.scheme}{self.place}" + (f":{self.tag}" if self.digest is None else f"@{DIGEST}{self.digest}")

    @property
    def is_layout(self) -> bool:
        """Whether `place` is a folder."""
        return self.scheme == "oci-layout:"

    @property
    def host(self) -> str:
        """The host of a registry, with its port."""
        return self.place.partition("/")[0]

    @property
    def is_on_loopback(self) -> bool:
        """Whether the registry is on this machine."""
        name = re.sub(r":\d+$", "", self.host).strip("[]")
        try:
            return ipaddress.ip_address(name).is_loopback
        except ValueError:
            return name == "localhost"

    def by_digest(self, digest: str) -> Reference:
        """The same artifact by its digest."""
        return replace(self, tag=None, digest=digest)

    def of_referrers(self) -> Reference:
        """The index of what refers to this artifact, which has a digest, where a registry keeps no list of its own."""
        return replace(self, tag=f"sha256-{self.digest}", digest=None)


def parse_reference(text: str) -> Reference:
    """The reference that a user wrote; UsageError for anything else."""
    match = _REGISTRY.fullmatch(text) or _LAYOUT.fullmatch(text)
    if match is None:
        remedy = "write oci://REGISTRY/NAME:TAG with the name in lower case, or oci-layout:DIR:TAG"
        raise UsageError(f"{text!r} is not a reference to an artifact", remedy)
    return Reference(**match.groupdict())
