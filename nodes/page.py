"""The server's half of the page in `web/`: what runs, as events and routes, and the buttons.

    GET  /tensor_parallel/groups                        what runs now
    POST /tensor_parallel/groups/{id}/{action}          sleep, wake, restart or release a group
    POST /tensor_parallel/gpu_counts?unet_name&devices&where&layout
    POST /tensor_parallel/gpu_counts?ckpt_name&devices&where&layout
                                                        which counts do not work there, and why
                                                        (a Ray cluster is asked by a process)
    POST /tensor_parallel/doctor                        the checks of `python -m tp_runtime doctor`
    GET  /tensor_parallel/python                        how a Python for the GPU processes stands
    POST /tensor_parallel/python/{make,cancel}          make it, or give that up

ComfyUI serves each of them below `/api` as well. The event `tensor_parallel.groups` carries what
the first route answers, to every page, whenever it changes. An answer that is no success has the
field `error`, a sentence for a person.
"""

import asyncio
import functools
import logging
import threading
import urllib.parse
from collections.abc import Awaitable, Callable
from concurrent.futures import Future
from ipaddress import ip_address
from typing import Any, TypeVar

from aiohttp import web
from comfy.cli_args import args

from ..tp_runtime.client import (
    OwnPython,
    TPRuntimeError,
    examine,
    get_runtime,
    runtime_python,
)
from .checkpoint_loader import checkpoint_path
from .early_start import lacks_runtime, prepare
from .gpu_count import refused_counts
from .loader import model_path
from .placement import Placement
from .settings import python_setting

logger = logging.getLogger("tensor_parallel")

GROUPS_EVENT = "tensor_parallel.groups"
_INTERVAL_S = 0.5
_WORKING = ("starting", "busy")
# The input of a loader that names its file → where that is.
_PATHS = {"unet_name": model_path, "ckpt_name": checkpoint_path}

Handler = Callable[[web.Request], Awaitable[Any]]
T = TypeVar("T")


def serve_page(server: Any) -> None:
    """Add the routes to ComfyUI's server and send it events from now on."""
    status = _Status()

    async def groups(_request: web.Request) -> Any:
        return await _in_thread(status.read)

    async def change_group(request: web.Request) -> Any:
        group_id, action = (request.match_info[name] for name in ("group_id", "action"))
        await _in_thread(_change_group, group_id, action)
        return await _in_thread(status.read)

    own = OwnPython()

    async def python(_request: web.Request) -> Any:
        refusal = _refusal() or own.refusal
        missing = await _in_thread(lacks_runtime)
        return {**own.progress().as_dict(), "missing": missing, "refusal": refusal}

    async def change_python(request: web.Request) -> Any:
        if refusal := _refusal(request.remote):
            raise _Refusal(403, refusal)
        await _in_thread({"make": own.make, "cancel": own.cancel}[request.match_info["action"]])
        return await python(request)

    server.app.middlewares.insert(0, _check_origins)
    routes = server.routes
    routes.get("/tensor_parallel/groups")(_answer(groups))
    routes.post("/tensor_parallel/groups/{group_id}/{action}")(_answer(_asked_first(change_group)))
    routes.post("/tensor_parallel/gpu_counts")(_answer(_asked_first(_gpu_counts)))
    routes.post("/tensor_parallel/doctor")(_answer(_asked_first(_doctor)))
    routes.get("/tensor_parallel/python")(_answer(python))
    routes.post("/tensor_parallel/python/{action:make|cancel}")(
        _answer(_asked_first(change_python))
    )
    events = server.loop.create_task(_send_events(server, status))
    events.add_done_callback(lambda task: task.cancelled() or task.result())  # logs what it raised
    server.tensor_parallel_events = events  # asyncio itself keeps no hold of it


class _Status:
    """What the groups are and hold, as plain data.

    Ranks are asked only while no group works: they answer between two requests. Until then what
    they said last stands.
    """

    def __init__(self) -> None:
        self._ranks: dict[str, list[dict[str, Any]]] = {}

    def read(self) -> dict[str, Any]:
        runtime = get_runtime()
        reports = runtime.groups()
        if not any(report.state in _WORKING for report in reports):
            reports = runtime.reports()
            self._ranks = {report.id: report.ranks for report in reports}
        groups = [
            {**report.as_dict(), "ranks": self._ranks.get(report.id, [])} for report in reports
        ]
        return {"groups": groups}


async def _send_events(server: Any, status: _Status) -> None:
    """Compare what is known without asking anybody, as long as a page is open."""
    shown = failed = None
    while True:
        await asyncio.sleep(_INTERVAL_S)
        if not server.sockets:
            continue
        try:
            now = get_runtime().groups()
            if now != shown:
                answer = await _in_thread(status.read)
                server.send_sync(GROUPS_EVENT, answer)
                # Another state by then, if only since somebody asked the ranks: said again.
                states = [(group["id"], group["state"]) for group in answer["groups"]]
                shown = now if states == [(group.id, group.state) for group in now] else None
        except Exception as error:  # of whatever type: logged, and the events go on
            if repr(error) != failed:
                logger.exception("The page could not be told what runs; it is tried again.")
            failed = repr(error)


def _change_group(group_id: str, action: str) -> None:
    runtime = get_runtime()
    actions: dict[str, Callable[[str], Any]] = {
        "sleep": runtime.sleep,
        "wake": runtime.wake,
        "restart": runtime.restart,
        "release": runtime.release,
    }
    if action not in actions:
        raise _Refusal(404, f"There is no action {action!r}: use one of {', '.join(actions)}.")
    actions[action](group_id)


async def _gpu_counts(request: web.Request) -> Any:
    """Without a name: what any model can have on this machine."""
    path = None
    for key in _PATHS.keys() & request.query.keys():
        name = request.query[key]
        path = _PATHS[key](name)
        if path is None:
            raise _Refusal(404, f"There is no model {name!r} in ComfyUI's folders.")
    keys = ("devices", "where", "layout")
    placement = Placement(**{key: request.query[key] for key in keys if key in request.query})
    counts = await _in_thread(refused_counts, path, placement)
    if path is not None and placement.where != "ray":
        # Somebody looks at a loader with its file: likely to run it soon.
        await _in_thread(prepare)
    return counts


async def _doctor(_request: web.Request) -> Any:
    checks = await _in_thread(examine, runtime_python(python_setting()))
    return {"checks": [check.as_dict() for check in checks]}


def _refusal(remote: str | None = None) -> str:
    """Why this server makes no Python for whoever asks; empty where it does.

    It runs pip: for the one person who sits at this machine.
    """
    if args.multi_user:
        return "ComfyUI serves several users (--multi-user): its administrator installs packages."
    for address in filter(None, (*args.listen.split(","), remote)):
        if not _is_loopback(address.strip()):
            return (
                f"ComfyUI can be reached over the network ({address.strip()}): run the commands on "
                "its machine, or start it without --listen."
            )
    return ""


def _is_loopback(host: str) -> bool:
    try:
        return ip_address(host).is_loopback
    except ValueError:
        return host == "localhost"


async def _in_thread(call: Callable[..., T], *args: Any) -> T:
    """What `call` returns, or raises, in a thread that ComfyUI does not wait for when it ends.

    It does wait for those of `asyncio.to_thread`, and a group may be starting in one.
    """
    future: Future[T] = Future()

    def run() -> None:
        try:
            future.set_result(call(*args))
        except BaseException as error:  # noqa: BLE001  it is raised where the result is awaited
            future.set_exception(error)

    threading.Thread(target=run, name="tensor-parallel-page", daemon=True).start()
    return await asyncio.wrap_future(future)


# --- answers -----------------------------------------------------------------------------------


class _Refusal(Exception):
    """An answer with another status than 200."""

    def __init__(self, status: int, message: str) -> None:
        super().__init__(message)
        self.status = status

    def answer(self) -> web.Response:
        return web.json_response({"error": str(self)}, status=self.status)


def _answer(handler: Handler) -> Handler:
    """Make a handler's result, or the error that it raises for a person, the JSON answer."""

    @functools.wraps(handler)
    async def answer(request: web.Request) -> web.Response:
        try:
            return web.json_response(await handler(request))
        except _Refusal as error:
            return error.answer()
        except TPRuntimeError as error:
            return _Refusal(400, str(error)).answer()

    return answer


@web.middleware
async def _check_origins(request: web.Request, handler: Handler) -> Any:
    """Before ComfyUI's own middleware, which answers 500 to what is no address."""
    if request.path.removeprefix("/api").startswith("/tensor_parallel/"):
        try:
            _check_origin(request)
        except _Refusal as error:
            return error.answer()
    return await handler(request)


def _check_origin(request: web.Request) -> None:
    """Refuse what another site's page has sent.

    ComfyUI compares Origin and Host where the host is this machine by name; here they are always
    compared, unless `--enable-cors-header` permits other sites to use ComfyUI. As there, a port
    counts only where both have one: behind a proxy, one of them may not.
    """
    origin = request.headers.get("Origin")
    if origin is None or args.enable_cors_header:
        return
    try:
        theirs, ours = urllib.parse.urlsplit(origin), urllib.parse.urlsplit(f"//{request.host}")
        same_port = None in (theirs.port, ours.port) or theirs.port == ours.port
        same = theirs.hostname == ours.hostname and same_port
    except ValueError:  # no address: brackets without an end, a port beyond 65535
        same = False
    if not same:
        raise _Refusal(
            403,
            f"Requests from {origin} are refused: this server was asked as {request.host}. A "
            "proxy has to pass the header Host on; --enable-cors-header lets other sites in.",
        )


def _asked_first(handler: Handler) -> Handler:
    """Refuse what a browser sends to another site without asking that first: it names no JSON.

    For what changes something. Where it asks, `_check_origins` sees the origin.
    """

    @functools.wraps(handler)
    async def checked(request: web.Request) -> Any:
        if request.content_type != "application/json":
            raise _Refusal(415, "Send this request with 'Content-Type: application/json'.")
        return await handler(request)

    return checked
