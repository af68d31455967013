"""Ray clusters for tests: hosts that are network namespaces of this machine, joined by a cable.

Each host has an address and a loopback device of its own, reaches the other over a pair of virtual
Ethernet devices only, and runs one Ray node. Every host but the first, on which the test itself
works, has processes and a `/dev/shm` of its own, too. Files are the same on all of them.
"""

import contextlib
import ctypes
import os
import secrets
import shutil
import signal
import subprocess
import sys
import tempfile
from collections.abc import Iterator, Mapping
from dataclasses import dataclass, field
from pathlib import Path

import psutil

from support.leaks import is_marked

CLONE_NEWNET = 0x40000000
PORT = 6379
START_TIMEOUT_S = 180.0
OBJECT_STORE_BYTES = 80 * 2**20

# Environment of every Ray process, the driver's included.
ENVIRONMENT = {
    "RAY_USAGE_STATS_ENABLED": "0",
    "RAY_AUTH_MODE": "token",
    "RAY_raylet_start_wait_time_s": "150",
    "RAY_worker_niceness": "0",
    # A lost host is given up sooner than after half a minute.
    "RAY_health_check_initial_delay_ms": "1000",
    "RAY_health_check_period_ms": "1000",
    "RAY_health_check_timeout_ms": "1000",
    "RAY_health_check_failure_threshold": "5",  # a machine may be busy
}

COUNT_NODES = """
import socket, sys, time
address, wanted = sys.argv[1], int(sys.argv[2])
host, port = address.split(":")
while socket.socket().connect_ex((host, int(port))):
    time.sleep(0.2)
from ray._raylet import GcsClient
while True:
    nodes = GcsClient(address=address).get_all_node_info(timeout=30).values()
    if sum(node.state == 0 for node in nodes) >= wanted:
        break
    time.sleep(0.5)
"""


def why_not() -> str:
    """Why this machine can have no such hosts; empty if it can."""
    if os.geteuid() != 0:
        return "network namespaces need root"
    missing = [tool for tool in ("ip", "unshare") if shutil.which(tool) is None]
    return f"no {missing}: `make hosts` installs them" if missing else ""


def _ip(*arguments: str) -> None:
    subprocess.run(["ip", *arguments], check=True, capture_output=True, text=True, timeout=10)


@dataclass
class Host:
    """One host and its Ray node, if that runs."""

    name: str
    address: str
    device: str
    slots: int
    log: Path
    process: subprocess.Popen[bytes] | None = field(default=None)
    is_cut_off: bool = False

    def start(self, head: "Host", folder: Path, environment: dict[str, str]) -> None:
        """Start its node; those of a cluster know each other a few seconds later."""
        arguments = ["--block", f"--node-ip-address={self.address}", f"--num-cpus={self.slots}"]
        arguments += [f"--object-store-memory={OBJECT_STORE_BYTES}", "--disable-usage-stats"]
        if self is head:
            arguments += ["--head", f"--port={PORT}", "--include-dashboard=false"]
            arguments += [f"--temp-dir={folder}"]
        else:
            arguments += [f"--address={head.address}:{PORT}"]
        ray = [sys.executable, "-m", "ray.scripts.scripts", "start", *arguments]
        if self is not head:
            own = 'mount -t tmpfs none /dev/shm && exec "$@"'
            apart = ["unshare", "--pid", "--fork", "--kill-child", "--mount-proc"]
            ray = [*apart, "sh", "-c", own, "sh", *ray]
        with open(self.log, "ab") as log:
            self.process = subprocess.Popen(
                ["ip", "netns", "exec", self.name, *ray],
                stdin=subprocess.DEVNULL,
                stdout=log,
                stderr=log,
                env=os.environ | environment,
                start_new_session=True,
            )

    def processes(self) -> list[psutil.Process]:
        """Every live process of this host, the test's excepted."""
        namespace = (Path("/run/netns") / self.name).stat().st_ino
        found = []
        for process in psutil.process_iter():
            with contextlib.suppress(OSError, psutil.Error):
                is_here = Path(f"/proc/{process.pid}/ns/net").stat().st_ino == namespace
                if is_here and process.pid != os.getpid():
                    found.append(process)
        return found

    def ranks(self) -> list[psutil.Process]:
        """The live ranks on this host."""
        return [one for one in self.processes() if is_marked(one, "RankActor")]

    def kill(self) -> None:
        """End everything that runs there, at once."""
        for process in self.processes():
            with contextlib.suppress(psutil.Error):
                process.send_signal(signal.SIGKILL)
        if self.process is not None:
            self.process.kill()
            self.process.wait()
            self.process = None

    def cut_off(self, is_off: bool = True) -> None:
        """Pull the cable, or put it in again."""
        self.is_cut_off = is_off
        _ip("-n", self.name, "link", "set", self.device, "down" if is_off else "up")


class Cluster:
    """Two hosts, with room for `slots` ranks each; a context that starts and ends them.

    A second host without slots has no node. `environment` is that of all Ray processes.
    """

    def __init__(self, slots: tuple[int, int], environment: Mapping[str, str]) -> None:
        mark = secrets.token_hex(3)
        self.folder = Path(tempfile.mkdtemp(prefix="tpr-", dir="/tmp"))
        token = {"RAY_AUTH_TOKEN": secrets.token_hex(16)}
        self.environment = {**ENVIRONMENT, **token, **environment}
        self.hosts = [
            Host(
                name=f"tp{mark}{index}",
                address=f"10.77.0.{index + 1}",
                device=f"tp{mark}{index}",
                slots=num,
                log=self.folder / f"host{index}.log",
            )
            for index, num in enumerate(slots)
        ]

    @property
    def address(self) -> str:
        return f"{self.hosts[0].address}:{PORT}"

    def __enter__(self) -> "Cluster":
        try:
            for host in self.hosts:
                _ip("netns", "add", host.name)
                _ip("-n", host.name, "link", "set", "lo", "up")
            one, other = self.hosts
            ends = ["peer", other.device, "netns", other.name]
            _ip("link", "add", one.device, "netns", one.name, "type", "veth", *ends)
            for host in self.hosts:
                _ip("-n", host.name, "addr", "add", f"{host.address}/24", "dev", host.device)
                _ip("-n", host.name, "link", "set", host.device, "up")
            self.start()
        except BaseException:
            self.__exit__()
            raise
        return self

    def start(self) -> None:
        """Have a node on every host, and all of them in one cluster."""
        nodes = [host for host in self.hosts if host.slots]
        for index, host in enumerate(nodes):
            if host.process is None or host.process.poll() is not None:
                host.kill()
                host.start(self.hosts[0], self.folder, self.environment)
            self._wait_for(index + 1)

    def _wait_for(self, num_nodes: int) -> None:
        """Until the first host knows so many nodes to be alive."""
        command = ["ip", "netns", "exec", self.hosts[0].name, sys.executable, "-c", COUNT_NODES]
        try:
            subprocess.run(
                [*command, self.address, str(num_nodes)],
                env=os.environ | self.environment,
                capture_output=True,
                timeout=START_TIMEOUT_S,
                check=True,
            )
        except (subprocess.CalledProcessError, subprocess.TimeoutExpired) as error:
            raise AssertionError(
                f"{num_nodes} Ray nodes did not come up: {self._logs()}"
            ) from error

    def _logs(self) -> str:
        return "\n".join(host.log.read_text()[-2000:] for host in self.hosts if host.log.exists())

    def __exit__(self, *_: object) -> None:
        for host in self.hosts:
            with contextlib.suppress(FileNotFoundError):
                host.kill()
            with contextlib.suppress(subprocess.CalledProcessError):  # it was never made
                _ip("netns", "del", host.name)
        shutil.rmtree(self.folder, ignore_errors=True)


@contextlib.contextmanager
def working_on(host: Host) -> Iterator[None]:
    """This thread, and whatever it starts, is on the network of `host`."""
    libc = ctypes.CDLL(None, use_errno=True)
    with open("/proc/thread-self/ns/net") as before, open(Path("/run/netns") / host.name) as there:
        assert libc.setns(there.fileno(), CLONE_NEWNET) == 0, os.strerror(ctypes.get_errno())
        try:
            yield
        finally:
            assert libc.setns(before.fileno(), CLONE_NEWNET) == 0
