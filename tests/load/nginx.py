"""nginx as a model server that answers at once: canned bodies from a compiled web server, as fast as there is.

`/whole/v1` answers with JSON, `/stream/v1` with server-sent events, whatever was asked. It runs from a folder of its
own, as whoever started the run, in one process, with keep-alive on and the access log off. Where it is not installed
its Debian package is unpacked beside the work folders, which needs no root and starts no service.
"""

from __future__ import annotations

import asyncio
import shutil
import subprocess
from collections.abc import AsyncIterator
from contextlib import asynccontextmanager
from pathlib import Path

from tests.load.hosts import OUT, Server, free_port, work_folder
from tests.load.llm_model import canned_events, canned_text, whole_answer

__all__ = ["TOKENS", "find_nginx", "running_nginx"]

TOKENS = 8
"""In an answer, whole or streamed; nginx takes no more than 4 KiB of text in its settings."""

UNPACKED = OUT / "nginx"

SETTINGS = """\
daemon off;
master_process off;
pid {folder}/nginx.pid;
error_log stderr warn;
events {{ worker_connections 4096; }}
http {{
    access_log off;
    keepalive_timeout 600s;
    keepalive_requests 1000000000;
    client_max_body_size 32m;
    client_body_buffer_size 1m;
    client_body_temp_path {folder}/body;
    proxy_temp_path {folder}/proxy;
    fastcgi_temp_path {folder}/fastcgi;
    uwsgi_temp_path {folder}/uwsgi;
    scgi_temp_path {folder}/scgi;
    server {{
        listen 127.0.0.1:{port} backlog=4096;
        location = /readyz {{ return 200; }}
        location /whole/ {{ default_type application/json; return 200 '{whole}'; }}
        location /stream/ {{ default_type text/event-stream; return 200 '{stream}'; }}
    }}
}}
"""


def find_nginx() -> Path:
    """The program; unpacked from Debian's package where the machine has none. Raises `RuntimeError`."""
    for place in (shutil.which("nginx"), "/usr/sbin/nginx", UNPACKED / "usr/sbin/nginx"):
        if place and Path(place).is_file():
            return Path(place)
    missing = "this run needs nginx; install it (Debian: apt-get install nginx-light)"
    if not shutil.which("apt-get") or not shutil.which("dpkg-deb"):
        raise RuntimeError(missing)
    UNPACKED.mkdir(parents=True, exist_ok=True)
    try:
        subprocess.run(["apt-get", "download", "nginx"], cwd=UNPACKED, check=True, capture_output=True)
        for package in UNPACKED.glob("nginx_*.deb"):
            subprocess.run(["dpkg-deb", "-x", str(package), str(UNPACKED)], check=True, capture_output=True)
        subprocess.run([str(UNPACKED / "usr/sbin/nginx"), "-v"], check=True, capture_output=True)
    except (subprocess.CalledProcessError, OSError) as exc:
        reason = exc.stderr.decode(errors="replace") if isinstance(exc, subprocess.CalledProcessError) else exc
        raise RuntimeError(f"{missing}: {reason}") from exc
    return UNPACKED / "usr/sbin/nginx"


@asynccontextmanager
async def running_nginx() -> AsyncIterator[Server]:
    """nginx, ready; stopped at the end."""
    program = await asyncio.to_thread(find_nginx)
    with work_folder("nginx") as folder:
        port = free_port()
        settings = SETTINGS.format(
            folder=folder,
            port=port,
            whole=whole_answer(canned_text(TOKENS)).decode(),
            stream=canned_events(TOKENS).decode(),
        )
        (folder / "nginx.conf").write_text(settings)
        command = [str(program), "-p", str(folder), "-e", "stderr", "-c", str(folder / "nginx.conf")]
        server = Server(command, port=port, folder=folder)
        try:
            await server.start()
            yield server
        finally:
            await server.stop()
