"""`edgetune push BUNDLE oci://…` and `edgetune pull oci://… --out DIR`: bundles in OCI registries and image layouts."""

from __future__ import annotations

from functools import partial
from pathlib import Path
from typing import Annotated

import typer

from .arguments import AsJson, BundlePath, Quiet, output_option, print_json, refuse_given

# Options by the groups in --help.
registry_option = partial(typer.Option, rich_help_panel="Registry")

Artifact = Annotated[
    str, typer.Argument(metavar="REFERENCE", help="oci://REGISTRY/NAME:TAG, or oci-layout:DIR:TAG for a folder.")
]
Username = Annotated[
    str | None,
    registry_option(
        metavar="NAME",
        help="Log in with this name, and the password in EDGETUNE_REGISTRY_PASSWORD (default: as `docker login` did).",
    ),
]
Insecure = Annotated[
    bool, registry_option("--insecure", help="Talk to the registry without encryption, as to one on this machine.")
]
TrustedKeys = Annotated[
    Path | None,
    registry_option(metavar="FILE", help="Refuse a bundle that none of these keys has signed, see `edgetune keys`."),
]
Channel = Annotated[str | None, registry_option(metavar="NAME", help="The channel of the release (default: stable).")]


def push(
    bundle: BundlePath,
    reference: Artifact,
    *,
    repo: Annotated[
        Path | None,
        registry_option(metavar="REPO", help="Attach the signed metadata of its release in this repository."),
    ] = None,
    channel: Channel = None,
    username: Username = None,
    insecure: Insecure = False,
    as_json: AsJson = False,
    quiet: Quiet = False,
) -> None:
    """Send a bundle to an OCI registry, or into an image layout.

    Files that are there already are not sent again, so a version with a changed adapter sends that one. The last line
    is the reference by digest, which always means this bundle. With --repo, the bundle must be the newest release
    there, and `edgetune pull --root` can check that it was when it was pushed.
    """
    from edgetune_runtime.update.state import DEFAULT_CHANNEL

    from edgetune.common.progress import Progress
    from edgetune.delivery.oci import transfer

    if repo is None:
        refuse_given({"--channel": channel}, "without --repo", "add --repo REPO, or leave it out")
    with transfer.open_store(reference, username, insecure=insecure) as store:
        pushed = transfer.push(bundle, store, Progress(quiet=quiet), repo=repo, channel=channel or DEFAULT_CHANNEL)
    if as_json:
        print_json(pushed.to_json())
        return
    print(f"{pushed.sent_bytes / 1e6:.1f} of {pushed.bytes / 1e6:.1f} MB sent")
    print(pushed.reference)


def pull(
    reference: Artifact,
    *,
    out: Annotated[Path, output_option(metavar="DIR", help="The bundle's folder; it may have another version of it.")],
    trusted_keys: TrustedKeys = None,
    root: Annotated[
        Path | None,
        registry_option(
            metavar="FILE", help="Refuse a bundle that is not the newest release by the keys of this N.root.json."
        ),
    ] = None,
    channel: Channel = None,
    username: Username = None,
    insecure: Insecure = False,
    as_json: AsJson = False,
    quiet: Quiet = False,
) -> None:
    """Fetch a bundle from an OCI registry, or from an image layout.

    Each file is compared with its digest. If this is interrupted, the next call goes on from there.
    """
    from edgetune_runtime.update.state import DEFAULT_CHANNEL, read_root_file

    from edgetune.common.progress import Progress
    from edgetune.delivery.oci import transfer
    from edgetune.delivery.oci.release_metadata import TrustedChannel

    if root is None:
        refuse_given({"--channel": channel}, "without --root", "add --root FILE, or leave it out")
    trusted = None if root is None else TrustedChannel(read_root_file(root), channel or DEFAULT_CHANNEL)
    with transfer.open_store(reference, username, insecure=insecure) as store:
        resolved = transfer.pull(store, out, Progress(quiet=quiet), trusted_keys=trusted_keys, trusted_channel=trusted)
    if as_json:
        print_json({"reference": str(resolved), "path": str(out)})
        return
    print(resolved)
    print(out)
