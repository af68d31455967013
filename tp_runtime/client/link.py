"""Has a new group measure how its GPUs are connected, if that is not known yet."""

from ..config import gpu_names
from ..errors import TPRuntimeError
from ..layouts.link_records import LinkRates, LinkRecords
from ..wire.protocol import MeasureLink
from .engine import Engine
from .poll import Poll


def measure_link(engine: Engine, links: LinkRecords, poll: Poll | None) -> None:
    """Remember the link between the group's GPUs; under a second, once on a machine.

    Of GPUs of this machine only, and of two or more. If it ends the group, it is not tried again.
    Raises as ``Engine.call``, and what ``poll`` raises.
    """
    config = engine.config
    if config.device != "cuda" or config.where != "this machine" or config.num_ranks == 1:
        return
    gpus = gpu_names(config.devices)
    if links.is_known(gpus):
        return
    links.begin(gpus)
    try:
        said = engine.call(MeasureLink, poll=poll)
    except TPRuntimeError:
        raise
    except BaseException:  # poll raised it
        links.forget(gpus)
        raise
    links.add(gpus, LinkRates.of_ranks(said))
