"""`actors nats-conf` and `actors nats-certs`: what a nats-server of your own needs to serve runs."""

import os
from pathlib import Path

import click

from actors.cli_options import size
from actors.errors import UserError

_OWNERS_ONLY = 0o600


@click.command("nats-conf")
@click.argument("folder", type=click.Path(path_type=Path, file_okay=False))
@click.option("--host", default="127.0.0.1", show_default=True, help="By which clients reach it.")
@click.option("--port", type=click.IntRange(1, 65535), default=4222, show_default=True)
@click.option(
    "--listen",
    default="127.0.0.1",
    show_default=True,
    help="The address that it listens on; 0.0.0.0 for all.",
)
@click.option(
    "--monitor", type=int, default=8222, show_default=True, help="Port, on loopback; 0: none."
)
@click.option(
    "--cluster",
    "others",
    multiple=True,
    help="The host of another server of a cluster, which gets FOLDER/HOST.conf; given for each of them.",
)
@click.option("--cluster-port", type=click.IntRange(1, 65535), default=6222, show_default=True)
@click.option("--store", help="Where it keeps its streams; by default FOLDER/store.")
@click.option(
    "--store-limit",
    type=size,
    metavar="SIZE",
    help="What they may take there, e.g. 50GB; near it admission stops. By default 3/4 of the disk, whose end is seen "
    "when it is reached.",
)
@click.option(
    "--tls",
    type=click.Path(path_type=Path, file_okay=False),
    help="What `actors nats-certs` has made: TLS, and nothing without it.",
)
@click.option(
    "--tls-seen-as", default="", help="That folder as the server sees it, in a container."
)
@click.option(
    "--analytics-sees-answers",
    is_flag=True,
    help="Lets the role `analytics` read the answers, too.",
)
def nats_conf(  # noqa: PLR0913 (one for each option)
    folder: Path,
    host: str,
    port: int,
    listen: str,
    monitor: int,
    others: tuple[str, ...],
    cluster_port: int,
    store: str | None,
    store_limit: int | None,
    tls: Path | None,
    tls_seen_as: str,
    analytics_sees_answers: bool,
) -> None:
    """Write FOLDER/nats.conf, and FOLDER/ROLE.json with a login for each role.

    Keys that are there stay. Give each machine the files of its own roles only; `actors … --nats FOLDER` uses them.
    """
    from bus.certificates import AUTHORITY, certificates
    from bus.logins import new_logins, read_kept
    from bus.server_config import Cluster, Server, config_text

    try:
        folder.mkdir(parents=True, exist_ok=True)
    except OSError as error:
        raise UserError(f"{folder}: {error.strerror}") from error
    files = certificates(tls, tls_seen_as) if tls else None
    logins = new_logins(
        ",".join(f"nats://{each}:{port}" for each in (host, *others)),
        os.path.relpath(tls / AUTHORITY, folder) if tls else "",
        kept=read_kept(folder),
    )
    logins.write(folder)
    routes = [f"{each}:{cluster_port}" for each in (host, *others)]
    server = Server(
        name=host,
        listen=f"{listen}:{port}",
        store=store or str((folder / "store").resolve()),
        logins=logins,
        limit_bytes=store_limit or 0,
        analytics_sees_answers=analytics_sees_answers,
        certificates=files,
        monitor=f"127.0.0.1:{monitor}" if monitor else "",
        cluster=Cluster(f"{listen}:{cluster_port}", routes) if others else None,
    )
    for other in others:
        (folder / f"{other}.conf").touch(mode=_OWNERS_ONLY)
        (folder / f"{other}.conf").write_text(config_text(server._replace(name=other)))
    path = folder / "nats.conf"
    path.touch(mode=_OWNERS_ONLY)
    path.write_text(config_text(server))
    click.echo(f"{path} and {len(logins.by_role)} logins: nats-server -c {path}")


@click.command("nats-certs")
@click.argument("folder", type=click.Path(path_type=Path, file_okay=False))
@click.option(
    "--host",
    "hosts",
    multiple=True,
    default=["localhost", "127.0.0.1", "nats"],
    show_default=True,
    help="A name or address of the server; may be given several times.",
)
@click.option("--days", type=click.IntRange(min=1), default=365, show_default=True)
def nats_certs(folder: Path, hosts: tuple[str, ...], days: int) -> None:
    """Make a certificate authority in FOLDER, once, and a server's certificate, signed by it."""
    from bus.certificates import make_certificates

    try:
        make_certificates(folder, hosts, days)
    except OSError as error:
        raise UserError(f"{folder}: {error.strerror}") from error
    click.echo(f"{folder}: ca.pem for clients; server.pem and server.key for the server")
