"""The routes of the page: what they answer, and whom they refuse."""

import json
import time
import urllib.error
import urllib.request
from collections.abc import Iterator
from typing import Any
from urllib.parse import quote

import pytest

from support.comfy_history import PromptError
from support.comfy_server import NO_GPU, ComfyServer
from support.group_reports import group
from support.pack import pack_module
from support.workflows import Sampling, tp_text_to_latent

pytestmark = pytest.mark.comfy

MODEL = "tiny_z_image.safetensors"
JSON = {"Content-Type": "application/json"}
PYTHON = "TensorParallel.Runtime.Python"


def ask(
    server: ComfyServer, path: str, headers: dict[str, str] | None = None, method: str = "POST"
) -> tuple[int, Any]:
    """The status and the JSON of an answer; a body that is no JSON as None."""
    data = b"{}" if method == "POST" else None
    request = urllib.request.Request(
        f"{server.url}/tensor_parallel{path}", data=data, headers=headers or {}, method=method
    )
    try:
        with urllib.request.urlopen(request, timeout=120) as reply:
            return reply.status, json.load(reply)
    except urllib.error.HTTPError as error:
        body = error.read()
        return error.code, json.loads(body) if body else None


def counts(server: ComfyServer, query: str) -> tuple[int, Any]:
    return ask(server, f"/gpu_counts?{query}", JSON)


def test_counts_of_a_model(comfy_server: ComfyServer) -> None:
    """Where the GPUs may share tokens, any."""
    assert counts(comfy_server, f"unet_name={MODEL}") == (
        200,
        {"num_gpus": 0, "refused": {}, "why": []},
    )


@pytest.mark.parametrize(
    ("layout", "possible", "words"),
    [
        ("tp", {1, 2, 3, 4, 5, 6, 8}, "num_heads=30"),
        ("2x2", {4}, "layout=2x2 takes 4 GPUs"),
        ("7x1", set(), "num_heads=30"),
        ("several", set(), "layout='several' is not in list"),
    ],
)
def test_counts_of_a_layout(
    comfy_server: ComfyServer, layout: str, possible: set[int], words: str
) -> None:
    status, answer = counts(comfy_server, f"unet_name={MODEL}&layout={layout}")
    assert status == 200
    assert {int(count) for count in answer["refused"]} == set(range(1, 9)) - possible
    assert words in answer["refused"]["7"]


def test_counts_of_any_model(comfy_server: ComfyServer) -> None:
    assert counts(comfy_server, "") == (200, {"num_gpus": 0, "refused": {}, "why": []})


@pytest.mark.parametrize(
    "name", ["../../comfyui.log", "/etc/passwd", "no such file", "..", "", "a/../../x"]
)
def test_only_models_of_comfyuis_folders(comfy_server: ComfyServer, name: str) -> None:
    status, answer = counts(comfy_server, f"unet_name={quote(name, safe='')}")
    assert status == 404
    assert answer == {"error": f"There is no model {name!r} in ComfyUI's folders."}


def test_a_file_that_is_no_model(comfy_server: ComfyServer) -> None:
    (comfy_server.models / "diffusion_models" / "empty.safetensors").write_bytes(b"")
    status, answer = counts(comfy_server, "unet_name=empty.safetensors")
    assert status == 400
    assert "empty.safetensors" in answer["error"]


def test_actions_on_a_group(comfy_server: ComfyServer) -> None:
    history = comfy_server.run(tp_text_to_latent(MODEL, 2, Sampling(seed=time.monotonic_ns())))
    group_id = group(history)["id"]
    assert ask(comfy_server, f"/groups/{group_id}/explode", JSON)[0] == 404
    status, answer = ask(comfy_server, "/groups/none/sleep", JSON)
    assert status == 400
    assert answer["error"].startswith("There is no group 'none': it has been released")

    status, answer = ask(comfy_server, f"/groups/{group_id}/sleep", JSON)
    (asleep,) = [found for found in answer["groups"] if found["id"] == group_id]
    assert all(model["asleep"] for model in asleep["models"].values())
    assert len(asleep["ranks"]) == 2

    status, answer = ask(comfy_server, f"/groups/{group_id}/release", JSON)
    assert group_id not in [found["id"] for found in answer["groups"]]


def test_events_say_what_runs(comfy_server: ComfyServer) -> None:
    comfy_server.events.clear()
    comfy_server.run(tp_text_to_latent(MODEL, 2, Sampling(seed=time.monotonic_ns())))
    event = comfy_server.events.wait_for(
        "tensor_parallel.groups", lambda event: any(g["step_ms"] for g in event.data["groups"])
    )
    assert event.data["groups"][0]["tp_size"] == 2
    marked = comfy_server.events.wait_for("tensor_parallel.node")
    assert marked.data["node"] == "sampler"
    shown = comfy_server.events.wait_for("text", lambda event: event.data["node"] == "report")
    assert shown.data["text"].startswith("2 CPU processes: ready\ntiny_z_image.safetensors: ")


ROUTES = [
    ("POST", "/doctor"),
    ("POST", "/groups/x/release"),
    ("GET", "/groups"),
    ("POST", f"/gpu_counts?unet_name={MODEL}"),
]


@pytest.mark.parametrize(
    "origin",
    [
        "http://evil.example",
        "https://127.0.0.1.evil.example",
        "http://my-machine:3000",
        "null",
        "http://my-machine:99999",  # no address: a port that cannot be, brackets without an end
        "http://[::1",
    ],
)
@pytest.mark.parametrize(("method", "path"), ROUTES)
def test_other_sites_are_refused(
    comfy_server: ComfyServer, method: str, path: str, origin: str
) -> None:
    evil = {**JSON, "Origin": origin, "Host": "my-machine:8188"}  # not what ComfyUI itself checks
    status, answer = ask(comfy_server, path, evil, method)
    assert status == 403
    assert answer["error"].startswith(
        f"Requests from {origin} are refused: this server was asked as my-machine:8188."
    )


@pytest.mark.parametrize(
    ("origin", "host"),
    [
        ("http://my-machine:8188", "my-machine:8188"),
        ("https://My-Machine", "my-machine:443"),  # behind a proxy that names its port
        ("https://my-machine:8443", "my-machine"),  # and one that does not
    ],
)
def test_the_page_itself_is_not_refused(comfy_server: ComfyServer, origin: str, host: str) -> None:
    own = {**JSON, "Origin": origin, "Host": host}
    assert ask(comfy_server, "/groups", own, "GET")[0] == 200
    assert "no group 'x'" in ask(comfy_server, "/groups/x/release", own)[1]["error"]


@pytest.mark.parametrize("kind", ["text/plain", "multipart/form-data", ""])
@pytest.mark.parametrize("path", ["/doctor", "/groups/x/release"])
def test_what_another_site_may_send_without_asking_is_refused(
    comfy_server: ComfyServer, path: str, kind: str
) -> None:
    assert ask(comfy_server, path, {"Content-Type": kind})[0] == 415


def test_a_python_setting_that_is_none(comfy_server: ComfyServer) -> None:
    comfy_server.post("/settings", {PYTHON: "/bin/sh"})
    try:
        with pytest.raises(PromptError, match="'Python of the GPU processes' is '/bin/sh'"):
            comfy_server.run(tp_text_to_latent(MODEL, 3))
        assert ask(comfy_server, "/doctor", JSON)[0] == 400
    finally:
        comfy_server.post("/settings", {PYTHON: ""})


@pytest.mark.parametrize(
    ("listen", "remote", "named"),
    [
        ("127.0.0.1", "127.0.0.1", ""),
        ("localhost", "::1", ""),
        ("127.0.0.1,::1", None, ""),
        ("0.0.0.0,::", "127.0.0.1", "0.0.0.0"),
        ("127.0.0.1,192.168.0.7", "127.0.0.1", "192.168.0.7"),
        ("127.0.0.1", "192.168.0.9", "192.168.0.9"),  # through something that passes it on
    ],
)
def test_a_python_is_made_for_who_sits_at_the_machine(
    monkeypatch: pytest.MonkeyPatch, listen: str, remote: str | None, named: str
) -> None:
    with pack_module("nodes.page") as page:
        monkeypatch.setattr(page.args, "listen", listen)
        refusal = page._refusal(remote)
    assert (f"over the network ({named})" in refusal) == bool(named)
    assert bool(refusal) == bool(named)


@pytest.fixture(scope="module")
def multi_user_server() -> Iterator[ComfyServer]:
    with ComfyServer(env=NO_GPU, extra_args=("--cpu", "--multi-user")) as server:
        yield server


def test_several_users(multi_user_server: ComfyServer) -> None:
    """The routes answer all of them alike, and no user's settings change what runs."""
    user = multi_user_server.post("/users", {"username": "ann"})
    headers = {**JSON, "Comfy-User": user}
    assert ask(multi_user_server, "/groups", headers, "GET") == (200, {"groups": []})
    request = urllib.request.Request(
        f"{multi_user_server.url}/settings",
        data=json.dumps({PYTHON: "/bin/sh"}).encode(),
        headers=headers,
    )
    urllib.request.urlopen(request, timeout=10).close()
    status, answer = ask(multi_user_server, "/python/make", headers)
    assert status == 403
    assert "--multi-user" in answer["error"]
    status, answer = ask(multi_user_server, "/doctor", headers)
    assert status == 200
    assert answer["checks"][0]["status"] == "ok"
