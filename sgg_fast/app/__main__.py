"""`python -m sgg_fast.app` (or `sgg-app`): opens the page, loads the model behind it, prints its address."""

from __future__ import annotations

import argparse
import contextlib
import os
import secrets
import signal
import socket
import sys
import threading
from collections.abc import Iterator
from typing import TYPE_CHECKING, Any

from sgg_fast.commands import command, refuse
from sgg_fast.commands.flags import OneLineParser

if TYPE_CHECKING:
    import uvicorn

    from sgg_fast.app.studio import Studio

NAME = "sgg-app"
EPILOG = """The address holds a token, so that other users of this machine stay out; new at each start unless the
environment has SGG_APP_TOKEN. Behind a proxy, for everyone: --host 0.0.0.0 --public NAME. Exit codes: 0 closed, 2 it
cannot start."""


def parse(argv: list[str] | None) -> argparse.Namespace:
    parser = OneLineParser(prog=NAME, description=__doc__, epilog=EPILOG)
    add = parser.add_argument
    add("--model", help="run of train.py, pipeline folder, hub id, or toy, which we ship (runs/toy if it is there)")
    add("--host", default="127.0.0.1", help="address to listen at (127.0.0.1: this machine only)")
    add("--port", type=int, default=7860, help="port to listen at, 0 for any that is free (7860)")
    add("--public", default="", metavar="NAME", help="host name under which a proxy shows the page, open to everyone")
    return parser.parse_args(argv)


def make_server(app: Any) -> uvicorn.Server:
    """The HTTP server of an ASGI application; it logs errors only."""
    import uvicorn

    config = uvicorn.Config(
        app, log_level="warning", access_log=False, server_header=False, lifespan="on", timeout_graceful_shutdown=2
    )
    return uvicorn.Server(config)


def listen(host: str, port: int) -> socket.socket:
    """A listening socket: a port in use is refused before anything is loaded."""
    family = socket.AF_INET6 if ":" in host else socket.AF_INET
    listener = socket.socket(family, socket.SOCK_STREAM)
    listener.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
    listener.bind((host, port))
    listener.listen(128)
    return listener


def address(host: str, port: int, token: str | None, public: str) -> str:
    """The page's address. The token follows a #, so browsers do not send it to any server."""
    if public:
        return f"https://{public}/"
    name = "127.0.0.1" if host in ("0.0.0.0", "::") else host
    return f"http://{f'[{name}]' if ':' in name else name}:{port}/#token={token}"


def report(studio: Studio, server: uvicorn.Server) -> None:
    """Print that the model is loaded; stop the server if it cannot be loaded."""
    studio.ready.wait()
    if studio.failure:
        server.should_exit = True
    else:
        print(f"sgg-app: ready, drawing with {studio.about()['description']}", file=sys.stderr, flush=True)


@contextlib.contextmanager
def closed_by_signals(server: uvicorn.Server) -> Iterator[None]:
    """Context in which Ctrl-C and SIGTERM close the server and do nothing else.

    uvicorn raises the signal again once it has closed, which would end the process by it.
    """

    def close(*_: object) -> None:
        server.should_exit = True

    before = {number: signal.signal(number, close) for number in (signal.SIGINT, signal.SIGTERM)}
    try:
        yield
    finally:
        for number, handler in before.items():
            signal.signal(number, handler)


@command(NAME)
def main(argv: list[str] | None) -> int:
    """Exit code: 0 closed by Ctrl-C or SIGTERM, 2 for what cannot be used (one line on stderr)."""
    args = parse(argv)
    try:
        from sgg_fast.app.server import make_app
        from sgg_fast.app.studio import Studio
    except ModuleNotFoundError as error:
        if error.name not in ("starlette", "uvicorn"):
            raise
        return refuse(NAME, f"{error.name} is not installed: pip install -c constraints.txt -e '.[app]'")
    try:
        listener = listen(args.host, args.port)
    except (OSError, OverflowError) as error:
        reason = getattr(error, "strerror", None) or error
        return refuse(NAME, f"cannot listen at {args.host}:{args.port}: {reason}; give another --port")
    token = None if args.public else os.environ.get("SGG_APP_TOKEN") or secrets.token_urlsafe(16)
    studio = Studio(args.model)
    app = make_app(studio, token, args.host, args.public)
    server = make_server(app)
    print(f"sgg-app: open {address(args.host, listener.getsockname()[1], token, args.public)}", flush=True)
    print("sgg-app: Ctrl-C closes it; the model is being loaded", file=sys.stderr, flush=True)
    threading.Thread(target=report, args=(studio, server), daemon=True).start()
    with closed_by_signals(server):
        server.run(sockets=[listener])
    if studio.failure:
        return refuse(NAME, studio.failure)
    return 0
