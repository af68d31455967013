"""The process of one rank: joins the group, then serves requests until its channel ends.

Started by the launcher as ``python -m tp_runtime.worker CONFIG``. Two threads: the main one
computes; the reader only receives frames and ends the process, whatever it is doing, when the
engine's process is gone.
"""

import contextlib
import logging
import os
import queue
import sys
import threading
import traceback

import msgspec

from .config import WorkerConfig
from .errors import REFUSALS
from .protocol import (
    Close,
    Done,
    Failed,
    Progress,
    Ready,
    Reply,
    Request,
    decode_request,
    encode,
)
from .transport import Channel, wait

logger = logging.getLogger("tp_runtime.worker")

PARENT_CHECK_S = 1.0


def _read_requests(
    channel: Channel, parent_pid: int, requests: "queue.SimpleQueue[Request]"
) -> None:
    """Thread: queue the requests; end the process at once when nobody is left to answer to."""
    try:
        while True:
            # A process that ComfyUI has forked may hold the stream open after ComfyUI's death.
            while not wait([channel], PARENT_CHECK_S):
                if os.getppid() != parent_pid:
                    raise EOFError("the parent process is gone")
            requests.put(decode_request(channel.receive()))
    except EOFError as error:
        logger.warning("ending: %s", error)
    except BaseException:
        logger.exception("ending: the reader failed")
    # Not sys.exit: the main thread may be inside a collective that will never return.
    os._exit(0)


def _serve(config: WorkerConfig, channel: Channel, requests: "queue.SimpleQueue[Request]") -> None:
    # Imported here so that the reader thread watches over the seconds that vLLM's import takes.
    from . import dist
    from .runner import Runner

    def send(reply: Reply) -> None:
        # Without a reader on the other side, the reader thread is about to end this process.
        with contextlib.suppress(EOFError):
            channel.send(encode(reply))

    device = dist.select_device(config)
    with dist.tensor_parallel_group(config) as tp_world_size:
        runner = Runner(config, device)
        send(Ready(config.rank, tp_world_size, runner.device_name(), dist.versions()))
        while not isinstance(request := requests.get(), Close):
            call = request.call

            def report_progress(done: int, total: int, call: int = call) -> None:
                send(Progress(call, done, total))

            try:
                send(Done(call, runner.handle(request, report_progress)))
            except tuple(REFUSALS.values()) as error:
                send(Failed(call, True, type(error).__name__, str(error), traceback.format_exc()))


def main() -> None:
    """Run the rank that the command line describes."""
    config = msgspec.json.decode(sys.argv[1], type=WorkerConfig)
    logging.basicConfig(
        level=config.log_level,
        format=f"%(asctime)s rank {config.rank} %(levelname)s %(name)s: %(message)s",
    )
    os.set_inheritable(config.control_fd, False)
    os.set_inheritable(config.exchange_fd, False)
    channel = Channel(config.control_fd)
    requests: queue.SimpleQueue[Request] = queue.SimpleQueue()
    threading.Thread(
        target=_read_requests, args=(channel, config.parent_pid, requests), daemon=True
    ).start()
    try:
        _serve(config, channel, requests)
    except BaseException as error:
        logger.exception("rank %d failed", config.rank)
        failure = Failed(-1, False, type(error).__name__, str(error), traceback.format_exc())
        with contextlib.suppress(EOFError):
            channel.send(encode(failure))
        # The other ranks may be inside a collective: the engine ends us all.
        os._exit(1)


if __name__ == "__main__":
    main()
