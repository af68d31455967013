"""Has a new group measure how its GPUs are connected, and how fast, if that is not known yet."""

import logging

from ..config import gpu_names
from ..errors import GroupClosedError, TPRuntimeError
from ..layouts.link_records import LinkRates, LinkRecords, Speed
from ..wire.protocol import MeasureLink
from .engine import Engine
from .poll import Poll

logger = logging.getLogger("tp_runtime")


def measure_link(engine: Engine, links: LinkRecords, poll: Poll | None) -> bool:
    """Remember the link between the group's GPUs, and their speed; a second, once on a machine.

    Of GPUs of this machine only, and of two or more. False: it has ended the group, of which the
    log tells. It is not tried again: the link is then what is usual for such GPUs.

    Raises what ``poll`` raises, and GroupClosedError: somebody has released the group.
    """
    config = engine.config
    if config.device != "cuda" or config.where != "this machine" or config.num_ranks == 1:
        return True
    gpus = gpu_names(config.devices)
    if links.is_known(gpus):
        return True
    links.begin(gpus)
    try:
        said = engine.call(MeasureLink, poll=poll)
    except GroupClosedError:  # a person wants no group now: the next one tries it again
        links.forget(gpus)
        raise
    except TPRuntimeError as error:
        logger.warning("The link between the GPUs was not measured: %s", error)
        return False
    except BaseException:  # poll raised it
        links.forget(gpus)
        raise
    speeds = [Speed.of_rank(one["speed"]) for one in said]
    links.add(gpus, LinkRates.of_ranks(said), speeds)
    return True
