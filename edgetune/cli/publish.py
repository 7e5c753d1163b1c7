"""`edgetune publish BUNDLE --repo REPO --keys KEYS`: a signed repository that devices update from."""

from __future__ import annotations

from contextlib import ExitStack
from pathlib import Path
from typing import Annotated

import typer
from edgetune_runtime.errors import UsageError

from .arguments import AsJson, Quiet, output_option, print_json
from .keys import open_keys
from .oci import Insecure, TrustedKeys, Username, registry_option


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
    channel: Annotated[str, typer.Option(metavar="NAME", help="The channel whose devices get the bundle.")] = "stable",
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
        int, typer.Option(metavar="N", min=1, help="Days until devices refuse a repository that nobody signed again.")
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
    --min-runtime if they are not given.
    """
    from edgetune.common.progress import Progress
    from edgetune.delivery.oci.transfer import open_store
    from edgetune.delivery.publish import mirror, one_adapter
    from edgetune.delivery.publish import publish as publishing

    folder, progress = open_keys(keys), Progress(quiet=quiet)
    if bundle is not None and source is not None:
        raise UsageError(f"both {bundle} and --from {source} are given", "give one bundle")
    with ExitStack() as stack:
        if source is not None:
            store = stack.enter_context(open_store(source, username, insecure=insecure))
            bundle = stack.enter_context(mirror.fetched(store, repo, folder, progress, trusted_keys))
        if bundle is None and adapter is not None:
            raise UsageError(f"--adapter {adapter} is given without a bundle", "give BUNDLE, or --from")
        if bundle is not None and adapter is not None:
            bundle, before = stack.enter_context(one_adapter.with_adapter(bundle, adapter, repo, folder, channel))
            min_runtime = before.min_runtime if min_runtime is None else min_runtime
            share = before.share if share is None else share
        if bundle is None:
            publishing.refresh(repo, folder, expires_days=expires_days, keep=keep)
            print(repo)
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
    if as_json:
        print_json(published.to_json())
        return
    release, state = published.release, "published" if published.changed else "was published already"
    deleted = "" if keep is None else f", {published.deleted_bytes / 1e6:.1f} MB deleted"
    copied = f"{published.copied_bytes / 1e6:.1f} MB copied"
    print(f"{release.name} version {release.version} in {channel} {state}, {copied}{deleted}")
    print(repo)
