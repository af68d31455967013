"""Every error that the runtime shows to a person. Both halves of the package use it.

A message says what went wrong, the value that was given, what is allowed and what to do.
Errors that are the caller's to mend are also ``ValueError``; after one of them the process
group is alive and the next request works. The others end the group; the next request starts
a new one.
"""

from .reasons import printable


class TPRuntimeError(RuntimeError):
    """Base of all errors of this package."""

    def __init__(self, message: str = "") -> None:
        # Names on Linux may be no UTF-8; what shows messages takes nothing else.
        super().__init__(printable(message))

    def __init_subclass__(cls) -> None:
        # ComfyUI shows a type with its module, which for a pack is the path of its folder.
        cls.__module__ = "tp_runtime"


class CheckpointError(TPRuntimeError, ValueError):
    """A model file is missing, damaged, of an unknown architecture, or lacks tensors."""


class SizeError(TPRuntimeError, ValueError):
    """The model cannot be split over so many GPUs, or the memory of GPUs or host cannot hold it."""


class DeviceError(TPRuntimeError, ValueError):
    """More GPUs were asked for than there are, or one that does not exist."""


class InputError(TPRuntimeError, ValueError):
    """A request's tensors or options do not fit the model. Nothing was computed."""


class NotFiniteError(TPRuntimeError):
    """The model's result has values that are NaN or infinite. The group is as it was before."""


class GroupStartError(TPRuntimeError):
    """The process group did not come up. No process of it is left."""


class RankError(TPRuntimeError):
    """A rank raised an error; the whole group was ended, since the others may wait for it."""


class GroupDiedError(TPRuntimeError):
    """A rank's process ended; the whole group was ended."""


class RankMemoryError(RankError):
    """A rank ran out of memory; the whole group was ended, and with it all that it held."""


class CallTimeoutError(TPRuntimeError):
    """The group did not answer in time and was ended."""


class GroupLostError(TPRuntimeError):
    """The group had failed before the request was sent: another group can carry it out."""


class GroupClosedError(TPRuntimeError):
    """A request was made to a group that somebody has closed, or that was never started."""


class ProtocolError(TPRuntimeError):
    """A message was malformed, too long, or of another protocol version."""


# What a rank may refuse a request with, before it takes part in any collective of it.
REFUSALS: dict[str, type[TPRuntimeError]] = {
    error.__name__: error for error in (InputError, CheckpointError, SizeError)
}
