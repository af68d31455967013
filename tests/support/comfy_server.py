"""A real ComfyUI server for the tests and the demo, with this pack installed in it.

The server gets its own base folder (models, custom_nodes, output, user), where `custom_nodes`
holds links to this checkout and to one more pack: that of the tests, unless told otherwise. Prompts
go over HTTP and progress comes over the websocket, as with ComfyUI's page.
"""

import contextlib
import functools
import json
import os
import random
import shutil
import signal
import socket
import subprocess
import sys
import tempfile
import time
import urllib.error
import urllib.request
from collections.abc import Callable, Iterable, Mapping
from pathlib import Path
from types import TracebackType
from typing import Any

import psutil
import torch
from safetensors.torch import load_file, save_file

from support.comfy_events import EventListener
from support.comfy_history import History, finished, validation_error
from support.leaks import WORKER_MARK, is_marked
from support.paths import REPOSITORY, TEST_PACK, comfyui_path
from support.workers import bound_s
from support.workflows import Prompt

PACK_FOLDER = "tensor-parallel"

# The reference is ComfyUI's fp32 on the CPU, so the ranks have to compute there, too.
# One thread: OpenMP's threads spin while they wait, and server and ranks share few cores.
NO_GPU = {"CUDA_VISIBLE_DEVICES": "", "OMP_NUM_THREADS": "1"}


class ComfyServer:
    """One running ComfyUI; a context manager, and every wait in it has a limit."""

    def __init__(
        self,
        *,
        env: Mapping[str, str] | None = None,
        extra_args: Iterable[str] = ("--cpu",),
        pack: Path = TEST_PACK,
        settings: Mapping[str, Any] | None = None,
    ) -> None:
        """Start ComfyUI and wait until it answers.

        Args:
            env: variables to set for the server on top of this process's own.
            extra_args: ComfyUI's options; pass `()` to let it use the GPU.
            pack: the node pack to install besides this checkout.
            settings: what a person has changed in ComfyUI's settings dialog before.
        """
        self._comfyui = comfyui_path()
        self.base = Path(tempfile.mkdtemp(prefix="comfy-server-"))
        self.models = self.base / "models"
        self.log_path = self.base / "comfyui.log"
        self._listener: EventListener | None = None
        self._orphans: list[psutil.Process] | None = None  # set by kill()
        self._link_packs(pack)
        if settings is not None:
            file = self.base / "user" / "default" / "comfy.settings.json"
            file.parent.mkdir()
            file.write_text(json.dumps(settings))
        self._port = _free_port()
        self.process = self._start(env or {}, extra_args)
        try:
            self._wait_until_up(timeout_s=180)
            self._listener = EventListener(f"ws://127.0.0.1:{self._port}/ws")
        except BaseException:
            self.stop()
            raise

    def __enter__(self) -> "ComfyServer":
        return self

    def __exit__(
        self,
        exc_type: type[BaseException] | None,
        exc: BaseException | None,
        traceback: TracebackType | None,
    ) -> None:
        self.stop()

    # Starting and stopping

    def _link_packs(self, pack: Path) -> None:
        for folder in ("models/diffusion_models", "custom_nodes", "input", "output", "user"):
            (self.base / folder).mkdir(parents=True)
        (self.base / "custom_nodes" / PACK_FOLDER).symlink_to(REPOSITORY)
        (self.base / "custom_nodes" / pack.name).symlink_to(pack)

    def _start(
        self, env: Mapping[str, str], extra_args: Iterable[str]
    ) -> "subprocess.Popen[bytes]":
        command = [sys.executable, "main.py", "--port", str(self._port)]
        command += ["--base-directory", str(self.base)]
        command += ["--database-url", f"sqlite:///{self.base / 'user' / 'comfyui.db'}"]
        command += ["--disable-api-nodes", "--preview-method", "latent2rgb", *extra_args]
        with self.log_path.open("wb") as log:
            return subprocess.Popen(
                command,
                cwd=self._comfyui,
                env={**os.environ, "PYTHONUNBUFFERED": "1", **env},
                stdin=subprocess.DEVNULL,
                stdout=log,
                stderr=subprocess.STDOUT,
                # A shell has what it runs in the background ignore the signal that stops ComfyUI.
                preexec_fn=functools.partial(signal.signal, signal.SIGINT, signal.SIG_DFL),
            )

    def _wait_until_up(self, timeout_s: float) -> None:
        deadline = time.monotonic() + timeout_s
        while True:
            self._check_alive()
            try:
                self.get("/system_stats")
            except OSError as error:  # who has its port for now may take it and say nothing, too
                if time.monotonic() > deadline:
                    raise TimeoutError(
                        f"no answer from ComfyUI in {timeout_s} s; its log:\n{self.log_tail()}"
                    ) from error
                time.sleep(0.2)
            else:
                return

    def _check_alive(self) -> None:
        code = self.process.poll()
        if code is not None:
            raise RuntimeError(f"ComfyUI ended with code {code}; its log:\n{self.log_tail()}")

    def children(self) -> list[psutil.Process]:
        """The server's live descendants: the ranks, and what they are forked from."""
        if self.process.poll() is not None:
            return []
        return psutil.Process(self.process.pid).children(recursive=True)

    def ranks(self) -> list[psutil.Process]:
        """The live ranks of the server's groups."""
        return [child for child in self.children() if is_marked(child, WORKER_MARK)]

    def kill_in_mid_evaluation(self, pid: int) -> None:
        """SIGKILL a rank while a prompt's sampler waits for it; of others, nobody would hear."""
        os.kill(pid, signal.SIGSTOP)
        seen = -1
        while seen != (now := len(self.events.all("progress"))):
            seen = now
            time.sleep(1)
        os.kill(pid, signal.SIGKILL)

    def kill(self) -> None:
        """SIGKILL ComfyUI alone, as a crash would: its children are left to themselves.

        `stop` still has to be called; it then waits for those children.
        """
        self._orphans = self.children()
        self.process.kill()
        self.process.wait(timeout=30)

    def stop(self) -> None:
        """Stop ComfyUI as Ctrl-C does and remove its folder; a second call does nothing.

        Raises:
            AssertionError: ComfyUI had ended before (`kill` apart) or did not stop in 20 s, or one
                of its children outlived it by 5 s. Either way everything is killed first.
        """
        if not self.base.exists():
            return
        crashed = self.process.poll() if self._orphans is None else None
        children = self.children() or self._orphans or []
        if self._listener is not None:
            self._listener.close()
        stopped = self._interrupt_process(timeout_s=20)
        _, survivors = psutil.wait_procs(children, timeout=bound_s(5))
        for survivor in survivors:
            survivor.kill()
        log_tail = self.log_tail()
        shutil.rmtree(self.base)
        assert crashed is None, f"ComfyUI ended with code {crashed}; its log:\n{log_tail}"
        assert stopped, f"ComfyUI did not stop on SIGINT; its log:\n{log_tail}"
        assert not survivors, f"children outlived ComfyUI: {survivors}; its log:\n{log_tail}"

    def _interrupt_process(self, timeout_s: float) -> bool:
        """Again where it had no effect: Python ignores one that meets the end of a weak reference
        (its log then says "Exception ignored in").
        """
        for _ in range(2):
            if self.process.poll() is None:
                self.process.send_signal(signal.SIGINT)
            with contextlib.suppress(subprocess.TimeoutExpired):
                self.process.wait(timeout=timeout_s)
                return True
            if "Exception ignored in" not in self.log_tail():
                break
        self.kill()
        return False

    # HTTP

    @property
    def url(self) -> str:
        return f"http://127.0.0.1:{self._port}"

    def get(self, path: str) -> Any:
        """GET a JSON document."""
        with urllib.request.urlopen(self.url + path, timeout=30) as reply:
            return json.load(reply)

    def post(self, path: str, body: Mapping[str, Any] | None = None, timeout_s: float = 30) -> Any:
        """POST `body` as JSON; the decoded reply, None when it is empty.

        For example `post("/free", {"unload_models": True})`.
        """
        request = urllib.request.Request(
            self.url + path,
            data=json.dumps(body or {}).encode(),
            headers={"Content-Type": "application/json"},
        )
        with urllib.request.urlopen(request, timeout=timeout_s) as reply:
            text = reply.read()
        return json.loads(text) if text.strip() else None

    def free_until(self, condition: Callable[[], bool], within_s: float = 60) -> None:
        """Have ComfyUI unload its models.

        It is asked again and again: what it is asked while it collects garbage after a prompt, it
        does after the next one only.
        """
        deadline = time.monotonic() + within_s
        while not condition():
            assert time.monotonic() < deadline, f"not within {within_s} s"
            self.post("/free", {"unload_models": True})
            time.sleep(0.2)

    # Prompts

    @property
    def events(self) -> EventListener:
        """What the server said over the websocket since it started."""
        assert self._listener is not None, "the server is not up"
        return self._listener

    def queue(self, prompt: Prompt) -> str:
        """Put a prompt in the queue and return its id.

        Raises:
            PromptError: ComfyUI's validation refused a node of the prompt.
        """
        body = {"prompt": prompt, "client_id": self.events.client_id}
        try:
            reply = self.post("/prompt", body)
        except urllib.error.HTTPError as error:
            if error.code != 400:
                raise
            reply = json.load(error)
        if reply.get("node_errors") or reply.get("error"):
            raise validation_error(reply)
        return str(reply["prompt_id"])

    def wait(self, prompt_id: str, timeout_s: float = 300) -> History:
        """Wait for a queued prompt to end; `events` then has all that was said of it.

        Raises:
            PromptError: a node raised, or the prompt was interrupted.
            TimeoutError: the prompt still runs after `timeout_s`.
            RuntimeError: ComfyUI died.
        """
        deadline = time.monotonic() + timeout_s
        while not (entries := self.get(f"/history/{prompt_id}")):
            self._check_alive()
            if time.monotonic() > deadline:
                raise TimeoutError(
                    f"the prompt still runs after {timeout_s} s; ComfyUI's log:\n{self.log_tail()}"
                )
            time.sleep(0.02)
        entry = entries[prompt_id]
        last_event = entry["status"]["messages"][-1][0]
        self.events.wait_for(last_event, lambda event: event.data.get("prompt_id") == prompt_id)
        return finished(prompt_id, entry)

    def run(self, prompt: Prompt, timeout_s: float = 300) -> History:
        """Queue a prompt and wait for it; raises what `queue` and `wait` raise."""
        return self.wait(self.queue(prompt), timeout_s)

    def interrupt(self) -> None:
        """Cancel the running prompt, as the page's button does."""
        self.post("/interrupt")

    def latents(self, history: History) -> dict[str, torch.Tensor]:
        """What the SaveLatent nodes of a prompt wrote: node id → latent."""
        found = {}
        for node_id, output in history.outputs.items():
            for file in output.get("latents", ()):
                path = self.base / "output" / file["subfolder"] / file["filename"]
                found[node_id] = load_file(path)["latent_tensor"]
        return found

    def latent(self, history: History) -> torch.Tensor:
        """The latent of a prompt with exactly one SaveLatent node."""
        (latent,) = self.latents(history).values()
        return latent

    def put_latent(self, name: str, latent: torch.Tensor) -> None:
        """Write a file that the LoadLatent node reads under this name (`….latent`)."""
        tensors = {"latent_tensor": latent, "latent_format_version_0": torch.zeros(0)}
        save_file(tensors, self.base / "input" / name)

    def pictures(self, history: History) -> list[Path]:
        """The files that the SaveImage nodes of a prompt wrote; they go when the server stops."""
        return [
            self.base / "output" / file["subfolder"] / file["filename"]
            for output in history.outputs.values()
            for file in output.get("images", ())
        ]

    # Log

    def log(self) -> str:
        """Everything ComfyUI printed so far."""
        return self.log_path.read_text(errors="replace")

    def log_tail(self, num_lines: int = 60) -> str:
        """The last lines of the log."""
        return "\n".join(self.log().splitlines()[-num_lines:])


def _free_port() -> int:
    """One that the system gives to nobody who asks for any: ComfyUI takes it seconds later."""
    first = int(Path("/proc/sys/net/ipv4/ip_local_port_range").read_text().split()[0])
    while True:
        port = random.SystemRandom().randrange(2 * first // 3, first)
        with socket.socket() as listener, contextlib.suppress(OSError):
            listener.bind(("127.0.0.1", port))
            return port
