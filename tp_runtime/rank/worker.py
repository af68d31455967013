"""The process of one rank: joins the group, then serves requests until its channel ends.

Forked by ``fork_server``, which has imported this module. Two threads: the main one receives
requests and computes; the watcher only ends the process, whatever it is doing, when the engine's
process is gone.
"""

import contextlib
import logging
import os
import select
import threading
import time
import traceback
from collections import deque
from collections.abc import Callable, Iterator

from .. import fault_points
from ..config import WorkerConfig
from ..errors import REFUSALS
from ..wire.mirror import Mirror
from ..wire.own_log import shorten_own_log
from ..wire.protocol import (
    Close,
    Done,
    Evaluate,
    Failed,
    FillModelPatch,
    Hold,
    Piece,
    Progress,
    Ready,
    Reply,
    Request,
    decode_request,
    encode,
)
from ..wire.transport import Channel, wait
from . import membership
from .requests import Runner, UnderWay

logger = logging.getLogger("tp_runtime.rank.worker")

PARENT_CHECK_S = 1.0
AWAKE_S = 0.02  # on a GPU: after an evaluation, the next may come as soon as this
LOOK_S = 0.0005  # while evaluations in stream order are under way, whether one is over


def _watch(channel: Channel, parent_pid: int) -> None:
    """Thread: end the process at once when nobody is left to answer to."""
    status = 1
    try:
        stream = select.poll()
        stream.register(channel, select.POLLRDHUP)
        # A process that ComfyUI has forked may hold the stream open after ComfyUI's death.
        while os.getppid() == parent_pid and not stream.poll(1000 * PARENT_CHECK_S):
            if channel.is_unheard():
                break
            shorten_own_log()
        logger.info("ending: nobody is left to answer to")
        status = 0
    except BaseException:
        logger.exception("ending: the watcher failed")
    finally:
        # Not sys.exit: the main thread may be inside a collective that will never return.
        os._exit(status)


def _requests(channel: Channel, awake_s: float, look: Callable[[], bool]) -> Iterator[Request]:
    """The requests as they come, until the stream ends.

    Received by the thread that carries them out: handing each over would cost a fifth of a
    millisecond, since a core that wakes up is slow. For the same reason it does not sleep in the
    ``awake_s`` after an evaluation, when the next one is likely. ``look``: called often while it
    says that something is under way.
    """
    awake_until = 0.0
    while not channel.ended:
        pause_s = LOOK_S if look() else PARENT_CHECK_S
        if time.monotonic() < awake_until or wait([channel], pause_s):
            for frame in channel.receive():
                request = decode_request(frame)
                yield request
                if awake_s and isinstance(request, Evaluate):
                    decode_request(frame)  # a rehearsal: the caches have forgotten how to do it
                    awake_until = time.monotonic() + awake_s
        elif pause_s == PARENT_CHECK_S:
            fault_points.reach("idle")


def _serve(config: WorkerConfig, channel: Channel) -> None:
    def send(reply: Reply) -> None:
        # Without a reader on the other side, the watcher is about to end this process.
        with contextlib.suppress(EOFError):
            channel.send(encode(reply))

    mirror = Mirror(config.exchange_fd) if config.mirrored else None
    fault_points.reach("start")
    device = membership.select_device(config)
    with membership.tensor_parallel_group(config) as tp_world_size:
        runner = Runner(config, device)
        under_way: deque[tuple[int, UnderWay]] = deque()

        def answer(*, wait: bool = False) -> bool:
            """For evaluations that are over, in their order; whether some are not."""
            while under_way and (wait or under_way[0][1].is_over()):
                number, evaluation = under_way.popleft()
                send(Done(number, runner.wait_for(evaluation)))
            return bool(under_way)

        send(Ready(config.rank, tp_world_size, runner.device_name(), membership.versions()))
        for request in _requests(channel, AWAKE_S if device.type == "cuda" else 0.0, answer):
            in_stream_order = isinstance(request, Evaluate) and request.in_stream_order
            answer(wait=not in_stream_order)
            if isinstance(request, Close):
                break
            if isinstance(request, Piece):
                assert mirror is not None, "this rank shares the engine's memory"
                mirror.put(request)
                continue
            if mirror is not None and isinstance(request, Evaluate | Hold | FillModelPatch):
                mirror.grow(request.exchange_bytes)
            call = request.call

            def report_progress(done: int, total: int, call: int = call) -> None:
                send(Progress(call, done, total))

            try:
                value = runner.handle(request, report_progress)
                if isinstance(value, UnderWay):
                    under_way.append((call, value))
                    continue
                if mirror is not None and isinstance(request, Evaluate):
                    for piece in _results(config, request, mirror):
                        send(piece)
                send(Done(call, value))
            except tuple(REFUSALS.values()) as error:
                answer(wait=True)
                send(_failed(call, True, error))


def _results(config: WorkerConfig, request: Evaluate, mirror: Mirror) -> Iterator[Piece]:
    """What this rank has written of the request's results."""
    if config.gives_results and config.batch_group < len(request.evaluations):
        for result in request.evaluations[config.batch_group].results:
            yield from mirror.pieces(result)


def run(config: WorkerConfig, parent_pid: int) -> None:
    """Be the rank until its channel, or the process ``parent_pid``, ends; returns on ``Close``."""
    logging.basicConfig(
        level=config.log_level,
        format=f"%(asctime)s rank {config.rank} %(levelname)s %(name)s: %(message)s",
    )
    fault_points.watch(config.rank, config.fault_file)
    channel = Channel.inherited(config.control_fd)
    threading.Thread(target=_watch, args=(channel, parent_pid), daemon=True).start()
    try:
        _serve(config, channel)
    except BaseException as error:
        failed = _failed(-1, False, error)
        logger.exception("rank %d failed", config.rank)
        try:
            channel.send(encode(failed))
        except EOFError:
            pass  # nobody is left to tell
        finally:
            # The other ranks may be inside a collective: the engine ends us all.
            os._exit(1)


def _failed(call: int, recoverable: bool, error: BaseException) -> Failed:
    """The message about the error that is being handled."""
    kind, trace = type(error).__name__, traceback.format_exc()
    return Failed(call, recoverable, kind, str(error), trace, time.monotonic())
