"""A network namespace: a host on the same machine with a cable of its own, which can be cut without a sound."""

from __future__ import annotations

import asyncio
import contextlib
import functools
import ipaddress
import itertools
import os
import secrets
import shutil
import signal
import socket
import subprocess
import sys
from pathlib import Path
from typing import Self

from tests.wasm.toolchains import Unavailable, debian

__all__ = ["Namespace", "can_use_namespaces"]

REMEDY = "install iproute2"
INSIDE = "eth0"
POOL = ipaddress.IPv4Network("198.18.0.0/15")
"""Set aside for tests of networks (RFC 2544): nobody's real address."""

NOBODY = "02:00:00:00:00:00"
"""A hardware address that none has: what is sent there is dropped by who gets it, and nobody is told."""

_numbers = itertools.count(1)


class Namespace:
    """A namespace with two networks to this machine: one to the servers, one for those who visit the host in it.

    Servers listen on `gateway`, or on any other address of the machine that is not the loopback (one namespace's
    gateway can be reached from all). Visitors come to `address`. When it is cut off from the servers, packets vanish
    both ways: no connection is closed or refused, as when a switch dies. Root only: see `can_use_namespaces`.
    """

    def __init__(self) -> None:
        self.name = f"hotdesk-{os.getpid()}-{next(_numbers)}"
        self._device = f"hd{secrets.token_hex(5)}"
        self._hardware = {"here": _hardware(), "there": _hardware()}
        self._servers = _free_network()
        self._visitors = _free_network(but=self._servers)
        self.gateway = str(self._servers[1])
        """This machine, to the host in the namespace: for its servers to listen on."""
        self.address = str(self._visitors[2])
        """The host, to its visitors on this machine; it has to listen there, or on all addresses."""

    async def __aenter__(self) -> Self:
        try:
            await self.start()
        except BaseException:
            self.remove()
            raise
        return self

    async def __aexit__(self, *exc_info: object) -> None:
        self.remove()

    async def aclose(self) -> None:
        """Kill what runs inside and remove it; a second call is fine."""
        self.remove()

    def remove(self) -> None:
        """The same without a loop: nothing can come in between, a cancelled test least of all."""
        listed = subprocess.run(["ip", "netns", "pids", self.name], capture_output=True, text=True, check=False)
        for pid in listed.stdout.split():
            with contextlib.suppress(ProcessLookupError):
                os.kill(int(pid), signal.SIGKILL)
        for command in (["link", "delete", self._device], ["netns", "delete", self.name]):
            subprocess.run(["ip", *command], capture_output=True, check=False)  # none of it may be there yet

    async def start(self) -> None:
        """Make it. Raises `RuntimeError` with what `ip` says."""
        self.make()  # 30 ms of standing still: a thread would go on making it while a cancelled test removes it

    def make(self) -> None:
        """The same without a loop."""
        here, there = self._hardware["here"], self._hardware["there"]
        networks = (self._servers, self._visitors)
        _run_ip(
            f"netns add {self.name}",
            f"link add {self._device} address {here} type veth peer name {INSIDE} address {there} netns {self.name}",
            *(f"address add {network[1]}/30 dev {self._device}" for network in networks),
            f"link set {self._device} up",
        )
        _run_ip(
            "link set lo up",
            *(f"address add {network[2]}/30 dev {INSIDE}" for network in networks),
            f"link set {INSIDE} up",
            f"route add default via {self.gateway}",
            inside=self.name,
        )
        self._set_ways(self._servers, self._visitors, cut=False)

    def command(self, *command: str | Path) -> list[str]:
        """The command that runs *command* inside, in the very process that is started; for what is to go on running."""
        return ["ip", "netns", "exec", self.name, *map(str, command)]

    async def run(self, *command: str | Path, timeout_s: float = 30.0) -> str:
        """Run *command* inside to its end and give what it printed.

        Raises `subprocess.CalledProcessError` when it fails and `TimeoutError`; it is killed then, and on a cancel.
        """
        args = self.command(*command)
        process = await asyncio.create_subprocess_exec(
            *args, stdin=subprocess.DEVNULL, stdout=subprocess.PIPE, stderr=subprocess.PIPE
        )
        try:
            async with asyncio.timeout(timeout_s):
                out, err = await process.communicate()
        finally:
            if process.returncode is None:
                process.kill()
                await process.wait()
        if process.returncode:
            raise subprocess.CalledProcessError(process.returncode, args, out.decode(), err.decode())
        return out.decode()

    async def cut(self, *, visitors: bool = False) -> None:
        """Let nothing pass between the host and the servers, nor, with *visitors*, between it and its visitors."""
        networks = (self._servers, self._visitors) if visitors else (self._servers,)
        await asyncio.to_thread(self._set_ways, *networks, cut=True)

    async def heal(self) -> None:
        """Let everything pass. Connections that outlived the cut go on once their ends try again."""
        await asyncio.to_thread(self._set_ways, self._servers, self._visitors, cut=False)

    def _set_ways(self, *networks: ipaddress.IPv4Network, cut: bool) -> None:
        """Write down in both ends where the other is. As nobody ever asks the network for it, a wrong note is a cut."""
        here, there = (NOBODY, NOBODY) if cut else (self._hardware["here"], self._hardware["there"])
        _run_ip(*(f"neigh replace {one[2]} lladdr {there} dev {self._device} nud permanent" for one in networks))
        _run_ip(
            *(f"neigh replace {one[1]} lladdr {here} dev {INSIDE} nud permanent" for one in networks), inside=self.name
        )


@functools.cache
def can_use_namespaces() -> str | None:
    """None, or the reason why there can be no namespaces here and what to do about it; tried once, in 50 ms.

    `ip` is installed where it is missing and that is allowed.
    """
    if not sys.platform.startswith("linux"):
        return "network namespaces are Linux's"
    if os.geteuid():
        return "only root may make network namespaces; run the tests as root"
    if not shutil.which("ip"):
        try:
            debian.install(["iproute2"], remedy=REMEDY)
        except Unavailable as exc:
            return f"network namespaces are made by ip: {exc}"
    trial = Namespace()
    try:
        trial.make()
    except RuntimeError as exc:
        return f"{exc}; run the tests with the capabilities NET_ADMIN and SYS_ADMIN"
    finally:
        trial.remove()
    return None


def _run_ip(*commands: str, inside: str | None = None) -> None:
    """Run *commands* of ip, in this machine or *inside* a namespace. Raises `RuntimeError` with what it says."""
    args = ["ip", *(["-n", inside] if inside else []), "-batch", "-"]
    lines = "".join(f"{command}\n" for command in commands)
    done = subprocess.run(args, input=lines, capture_output=True, text=True, check=False)
    if done.returncode:
        raise RuntimeError(f"{' '.join(args)} could not do all of {commands}: {done.stderr.strip()}")


def _hardware() -> str:
    """A hardware address of one's own making, which the second bit says."""
    return ":".join(["02", *(secrets.token_hex(1) for _ in range(5))])


def _free_network(but: ipaddress.IPv4Network | None = None) -> ipaddress.IPv4Network:
    """Four addresses of the pool of which the machine has none."""
    while True:
        start = int(POOL.network_address) + 4 * secrets.randbelow(POOL.num_addresses // 4)
        network = ipaddress.IPv4Network((start, 30))
        with socket.socket() as probe:
            try:
                probe.bind((str(network[1]), 0))
            except OSError:
                if network != but:
                    return network
