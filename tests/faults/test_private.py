"""Who else can reach a group: nobody. Nothing listens, nothing is readable, nothing tells."""

import contextlib
import itertools
import os
import socket
import stat
import subprocess
from pathlib import Path
from typing import Any

import psutil
import pytest
import torch
from process.conftest import PythonWith, cpu_group, make_inputs

from support.waiting import wait_until
from support.workers import bound_s
from tp_runtime.client import ModelSpec, RankError, RemoteModel, Runtime
from tp_runtime.client.group_state import State
from tp_runtime.config import log_level

pytestmark = pytest.mark.process

SECRET = "a prompt that is nobody's business"


@pytest.fixture(scope="module")
def model(runtime: Runtime, tiny_z_image: Path) -> RemoteModel:
    """On two real ranks; evaluated once."""
    model = runtime.model(ModelSpec.of(str(tiny_z_image), "float32", "float32"), cpu_group(2))
    model.ensure_loaded()
    model.evaluate(make_inputs())
    return model


def ranks_of(model: RemoteModel) -> list[Any]:
    engine = model._group.engine
    assert engine is not None
    return engine.ranks


def test_no_address(model: RemoteModel) -> None:
    """What torch's collectives listen on is loopback's; of unix sockets none has a name."""
    this = psutil.Process()
    for process in (this, *(psutil.Process(rank.pid) for rank in ranks_of(model))):
        for connection in process.net_connections("inet"):
            assert connection.laddr.ip in ("127.0.0.1", "::1", "::ffff:127.0.0.1"), connection
    names = {
        line.split()[7]
        for line in Path("/proc/net/unix").read_text().splitlines()[1:]
        if len(line.split()) > 7
    }
    assert not [name for name in names if "tp-runtime" in name or "tp_runtime" in name]
    ours = {
        str(connection.laddr)
        for rank in ranks_of(model)
        for connection in psutil.Process(rank.pid).net_connections("unix")
    }
    assert ours <= {""}


def listening(model: RemoteModel) -> list[tuple[str, int]]:
    """Where torch's collectives listen, in the ranks."""
    return [
        tuple(connection.laddr)
        for rank in ranks_of(model)
        for connection in psutil.Process(rank.pid).net_connections("inet")
        if connection.status == psutil.CONN_LISTEN
    ]


def test_a_stranger_who_calls_the_collectives_does_no_harm(model: RemoteModel) -> None:
    """Whatever it sends there, while they work and afterwards; the numbers are as before."""
    inputs = make_inputs(seed=4)
    expected = model.evaluate(inputs)
    ranks = ranks_of(model)
    addresses = listening(model)
    assert addresses
    sent = [b"", b"\0" * 8, b"\xff" * 8, os.urandom(2**16), b"GET / HTTP/1.1\r\n\r\n"]
    strangers = []
    for address, data in itertools.product(addresses, sent):
        stranger = socket.create_connection(address, timeout=10)
        strangers.append(stranger)
        with contextlib.suppress(ConnectionError):
            stranger.sendall(data)
        assert torch.equal(model.evaluate(inputs), expected)
    for stranger in strangers:
        stranger.close()
    assert torch.equal(model.evaluate(inputs), expected)
    assert ranks_of(model) is ranks


def exchange_of(pid: int) -> list[Path]:
    """Where a process has the shared memory of a group open."""
    found = []
    for fd in Path(f"/proc/{pid}/fd").iterdir():
        with contextlib.suppress(FileNotFoundError):  # this very list
            found += [fd] if "tp-runtime-exchange" in str(fd.readlink()) else []
    assert found
    return found


@pytest.mark.skipif(os.getuid() != 0, reason="only root can become another user")
def test_another_user_can_open_nothing(model: RemoteModel) -> None:
    """Not the logs, not the rendezvous, not the shared memory, nor what a process has in memory."""
    paths = [*ranks_of(model)[0].log_path.parent.iterdir()]
    for pid in (os.getpid(), *(rank.pid for rank in ranks_of(model))):
        paths += [*exchange_of(pid), Path(f"/proc/{pid}/mem"), Path(f"/proc/{pid}/environ")]
    for path in paths:
        path.open("rb").close()
    tell = 'for path; do (: < "$path") 2>&- && echo "$path can be read"; done; echo done'
    nobody = subprocess.run(
        ["/bin/sh", "-c", tell, "sh", *map(str, paths)],
        user=65534,
        group=65534,
        extra_groups=[],
        capture_output=True,
        text=True,
        check=True,
        timeout=60,
    )
    assert nobody.stdout == "done\n"


def test_the_folder_is_its_owners(model: RemoteModel) -> None:
    folder = ranks_of(model)[0].log_path.parent
    assert stat.S_IMODE(folder.stat().st_mode) == 0o700
    assert stat.S_IMODE(folder.parent.stat().st_mode) == 0o700
    for rank in ranks_of(model):
        assert stat.S_IMODE(rank.log_path.stat().st_mode) == 0o600


def test_a_child_of_a_rank_inherits_nothing(model: RemoteModel) -> None:
    """Neither the channel nor the shared memory: compilers are started by ranks."""
    unix_sockets = {
        f"socket:[{line.split()[6]}]"
        for line in Path("/proc/net/unix").read_text().splitlines()[1:]
    }
    for rank in ranks_of(model):
        links = {fd.name: str(fd.readlink()) for fd in Path(f"/proc/{rank.pid}/fd").iterdir()}
        channel = [fd for fd, link in links.items() if link in unix_sockets]
        memory = [fd for fd, link in links.items() if "tp-runtime-exchange" in link]
        assert len(channel) == 1
        assert memory
        for fd in channel + memory:
            info = Path(f"/proc/{rank.pid}/fdinfo/{fd}").read_text()
            (flags,) = (line.split()[1] for line in info.splitlines() if line[:5] == "flags")
            assert int(flags, 8) & os.O_CLOEXEC


def test_logs_hold_no_prompt(
    runtime: Runtime,
    python_with: PythonWith,
    tiny_z_image: Path,
    caplog: pytest.LogCaptureFixture,
) -> None:
    """Neither the ranks' nor ComfyUI's, also when a rank fails."""
    assert log_level() == "INFO"
    spec = ModelSpec.of(str(tiny_z_image), "float32", "float32")
    model = runtime.model(spec, cpu_group(2, python=python_with()))
    model.ensure_loaded()
    ranks = ranks_of(model)
    inputs = make_inputs() | {"transformer_options": {"text": SECRET}}
    model.evaluate(inputs)
    inputs["transformer_options"] |= {"rank": 1, "raise": "an error"}
    with pytest.raises(RankError):
        model.evaluate(inputs)
    text = caplog.text + "".join(rank.log_path.read_text() for rank in ranks)
    assert "an error" in text
    assert SECRET not in text


def test_no_port_is_left(model: RemoteModel) -> None:
    """Of the collectives, after a rank has died."""
    addresses = listening(model)
    assert addresses
    ranks_of(model)[0].kill()
    wait_until(lambda: model._group.engine.state is State.FAILED)
    wait_until(lambda: not any(map(answers, addresses)), within_s=bound_s(1))


def answers(address: tuple[str, int]) -> bool:
    try:
        socket.create_connection(address, timeout=5).close()
    except ConnectionRefusedError:
        return False
    return True
