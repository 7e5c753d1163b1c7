"""`edgetune publish BUNDLE --repo REPO --keys KEYS`: a signed repository that devices update from."""

from __future__ import annotations

from contextlib import ExitStack
from pathlib import Path
from typing import TYPE_CHECKING, Annotated

import typer
from edgetune_runtime.errors import UsageError

from .arguments import AsJson, Quiet, output_option, print_json, refuse_given
from .keys import open_keys
from .oci import Insecure, TrustedKeys, Username, registry_option

if TYPE_CHECKING:
    from edgetune.delivery.publish.publish import Published


def publish(
    bundle: Annotated[
        Path | None, typer.Argument(metavar="[BUNDLE]", help="The bundle (default: only sign the repository again).")
    ] = None,
    *,
    repo: Annotated[Path, output_option(metavar="REPO", help="The repository's folder, which a web server serves.")],
    keys: Annotated[Path, typer.Option(metavar="KEYS", help="The keys that `edgetune keys init` made.")],
    adapter: Annotated[
        str | None,
        typer.Option(metavar="NAME", help="Publish only this adapter of BUNDLE, in the newest release of that name."),
    ] = None,
    channel: Annotated[
        str | None, typer.Option(metavar="NAME", help="The channel whose devices get the bundle (default: stable).")
    ] = None,
    min_runtime: Annotated[
        str | None,
        typer.Option(
            metavar="VERSION",
            help="The oldest edgetune-runtime that may run it (default: any; with --adapter: unchanged).",
        ),
    ] = None,
    share: Annotated[
        float | None,
        typer.Option(
            metavar="PART",
            min=0,
            max=1,
            help="The share of devices that get it; publish again to raise it (default: 1; with --adapter: unchanged).",
        ),
    ] = None,
    expires_days: Annotated[
        int,
        typer.Option(
            metavar="N", min=1, max=36_500, help="Days until devices refuse a repository that nobody signed again."
        ),
    ] = 90,
    keep: Annotated[
        int | None,
        typer.Option(
            metavar="N", min=1, help="Delete releases older than the newest N of each channel (default: none)."
        ),
    ] = None,
    source: Annotated[
        str | None,
        registry_option("--from", metavar="REFERENCE", help="Publish the bundle of oci://REGISTRY/NAME:TAG."),
    ] = None,
    trusted_keys: TrustedKeys = None,
    username: Username = None,
    insecure: Insecure = False,
    as_json: AsJson = False,
    quiet: Quiet = False,
) -> None:
    """Publish a bundle as the newest release of its name, for `edgetune-run update` on devices.

    Files that the repository has already are not copied again. The bundle gets a file manifest.json.sig, its
    signature. Without BUNDLE the repository is only signed again, as before it expires or after a change of keys.
    With --from, a bundle that is named by a tag must be signed by KEYS, or by --trusted-keys. With --adapter, BUNDLE
    needs no other adapter, and gets no signature: all else is that of the newest release, also --share and
    --min-runtime if they are not given. If KEYS has the private key of bundles/NAME/ADAPTER and none of the bundle, the
    adapter is published as a part that its author has signed, for all devices of the channel.
    """
    from edgetune_runtime.bundle import read_manifest
    from edgetune_runtime.update.release import RUNTIME_VERSION
    from edgetune_runtime.update.state import DEFAULT_CHANNEL

    from edgetune.common.progress import Progress
    from edgetune.delivery.oci.transfer import open_store
    from edgetune.delivery.publish import author, mirror, one_adapter
    from edgetune.delivery.publish import publish as publishing

    if min_runtime and not RUNTIME_VERSION.fullmatch(min_runtime):
        raise UsageError(f"--min-runtime is {min_runtime!r}, not a version", "write it as 1.2.0")
    registry = {"--trusted-keys": trusted_keys, "--username": username, "--insecure": insecure}
    if source is None:
        refuse_given(registry, "without --from", "add --from REFERENCE, or leave it out")
    release = {"--adapter": adapter, "--channel": channel, "--min-runtime": min_runtime, "--share": share}
    if bundle is None and source is None:
        refuse_given(release, "without a bundle", "give BUNDLE or --from, or leave it out")
    folder, progress, channel = open_keys(keys), Progress(quiet=quiet), channel or DEFAULT_CHANNEL
    if bundle is not None and source is not None:
        raise UsageError(f"both {bundle} and --from {source} are given", "give one bundle")
    with ExitStack() as stack:
        if source is not None:
            store = stack.enter_context(open_store(source, username, insecure=insecure))
            bundle = stack.enter_context(mirror.fetched(store, repo, folder, progress, trusted_keys))
        if bundle is not None and adapter is not None:
            owner = folder.role_of(read_manifest(bundle).name)
            if owner not in folder.roles_here:
                if share is not None or min_runtime is not None:
                    message = f"--share or --min-runtime is given, and KEYS has no private key of {owner}"
                    raise UsageError(message, "leave them out: the owner of the bundle decides who gets a release")
                published = author.publish_part(
                    bundle, adapter, repo, folder, channel=channel, expires_days=expires_days, keep=keep
                )
                _show(published, repo, keep, as_json=as_json)
                return
            bundle, before = stack.enter_context(one_adapter.with_adapter(bundle, adapter, repo, folder, channel))
            min_runtime = before.min_runtime if min_runtime is None else min_runtime
            share = before.share if share is None else share
        if bundle is None:
            publishing.refresh(repo, folder, expires_days=expires_days, keep=keep)
            print_json({"path": str(repo)}) if as_json else print(repo)
            return
        published = publishing.publish(
            bundle,
            repo,
            folder,
            progress,
            channel=channel,
            min_runtime=min_runtime or "",
            share=1.0 if share is None else share,
            expires_days=expires_days,
            keep=keep,
        )
    _show(published, repo, keep, as_json=as_json)


def _show(published: Published, repo: Path, keep: int | None, *, as_json: bool) -> None:
    if as_json:
        print_json(published.to_json())
        return
    release, state = published.release, "published" if published.changed else "was published already"
    deleted = "" if keep is None else f", {published.deleted_bytes / 1e6:.1f} MB deleted"
    copied = f"{published.copied_bytes / 1e6:.1f} MB copied"
    title = f"{release.name} version {release.version} in {release.channel}"
    if published.part:
        title = f"part {published.part} of {published.adapter} for {title}"
    print(f"{title} {state}, {copied}{deleted}")
    print(repo)
