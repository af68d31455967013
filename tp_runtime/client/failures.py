"""How a group failed, as the error that a person sees."""

import contextlib
import logging
import math
import re
from collections.abc import Iterator, Sequence

from .. import reasons
from ..config import GroupConfig
from ..errors import (
    CallTimeoutError,
    GroupDiedError,
    GroupLostError,
    GroupStartError,
    InputError,
    NotFiniteError,
    RankError,
    RankMemoryError,
    TPRuntimeError,
)
from ..tools.doctor import how_to_have_runtime
from ..wire.exchange import dtype_name
from ..wire.protocol import Failed
from .batch_split import tensors_in
from .launch.launcher import Rank
from .tensor_sender import Asked

logger = logging.getLogger("tp_runtime")

_IMPORT_ERROR = re.compile(r"^(?:ModuleNotFoundError|ImportError): (.*?)\.?$", re.MULTILINE)
# torch's words, on a GPU and on a CPU.
_NO_MEMORY = re.compile(r"out of memory|can't allocate memory|^MemoryError", re.IGNORECASE)
_ASKED = re.compile(r"[Tt]ried to allocate (\d[\d.]* \w+)")
_HELD = re.compile(r"this process has (\d[\d.]* \w+) memory in use")
_OF_GPU = re.compile(r"total capacity of (\d[\d.]* \w+) of which (\d[\d.]* \w+) is free")
_UNITS = {"bytes": 2**-30, "KiB": 2**-20, "MiB": 2**-10, "GiB": 1.0}
_BY_OTHERS_GIB = 1.0  # what other processes hold of a GPU, above which they are named


def not_started(
    config: GroupConfig, ranks: Sequence[Rank], blamed: Rank | None, error: BaseException
) -> GroupStartError:
    """For a group whose ranks did not all become ready."""
    if not ranks:
        return GroupStartError(f"No rank of the process group could be started: {error}")
    tails = [rank.log_tail() for rank in ranks]
    lacking = _lacking(config, tails)
    if lacking:
        return GroupStartError(f"{lacking} Logs: {ranks[0].log_path.parent}")
    tail = tails[blamed.index if blamed else 0]
    return GroupStartError(
        f"The process group of {config.num_ranks} {config.device.upper()} ranks did not start: "
        f"{advised(str(error), tail)} Runtime Python: {config.python}. The log ends:\n{tail}"
    )


def advised(sentence: str, log: str) -> str:
    """The sentence, and what to do about what the log shows, if it does not say so itself."""
    what_to_do = reasons.advice(log)
    return sentence if what_to_do in sentence else f"{sentence} {what_to_do}"


def no_python(config: GroupConfig, error: OSError) -> GroupStartError:
    """For a group whose Python cannot be run as a program."""
    packages = "ray, vllm" if config.where == "ray" else "vllm"
    return GroupStartError(
        f"The runtime's Python {config.python!r} could not be started: {error}. "
        + (
            reasons.advice(str(error))
            or f"Set TP_RUNTIME_PYTHON to a Python that has {packages} and diffusers installed."
        )
    )


@contextlib.contextmanager
def on_ray() -> Iterator[None]:
    """What the system refuses in the body ends as a GroupStartError that says what to do."""
    try:
        yield
    except OSError as error:
        raise GroupStartError(
            f"A process group on Ray could not be started: {reasons.of(error)}"
        ) from error


def no_fork_server(config: GroupConfig, error: BaseException, log: str) -> GroupStartError:
    """For a group whose fork server did not come up; ``log``: what that process has printed."""
    logger.error("the fork server:\n%s", log)
    return GroupStartError(
        _lacking(config, [log])
        or f"The process that imports what the ranks need {advised(f'{error}.', log)} "
        f"Runtime Python: {config.python}. The log ends:\n{log}"
    )


def _lacking(config: GroupConfig, logs: Sequence[str]) -> str | None:
    """What to install, if one of the logs says that something cannot be imported."""
    found = next(filter(None, map(_IMPORT_ERROR.search, logs)), None)
    # The node in the page shows the first hundred letters without being scrolled.
    return found and f"{found[1]}. {how_to_have_runtime(config.python)}"


def silence(silent: Sequence[Rank], timeout_s: float, doing: str) -> CallTimeoutError:
    """For ranks that have not answered in time."""
    return CallTimeoutError(
        f"Ranks {[rank.index for rank in silent]} gave no sign of life for {timeout_s:g} s "
        f"during '{doing}'; the group was ended. The next request starts a new one. "
        f"Logs: {silent[0].log_path.parent}"
    )


def death(rank: Rank, doing: str | None) -> GroupDiedError:
    """For a rank whose process has ended."""
    return GroupDiedError(
        f"Rank {rank.index} ({rank.place}) {rank.describe_exit()}{_during(doing)}; the "
        f"group was ended. The next request starts a new one. Log: {rank.log_path}"
    )


def lost(error: TPRuntimeError | None) -> GroupLostError:
    """For a request that was not sent, since the group had failed of ``error``.

    None: of a rank's end that its owner has yet to look at.
    """
    cause = error or "a rank has ended."
    return GroupLostError(f"The process group has failed before: {cause} Queue the prompt again.")


def rank_error(config: GroupConfig, rank: Rank, failed: Failed, doing: str | None) -> RankError:
    """For a rank that raised."""
    logger.error("rank %d:\n%s", rank.index, failed.traceback)
    if _NO_MEMORY.search(f"{failed.kind}: {failed.message}"):
        return _no_memory(config, rank, failed, doing)
    return RankError(
        f"Rank {rank.index} raised {failed.kind}{_during(doing)}: "
        f"{advised(failed.message, failed.message)} The group was ended; the next request starts "
        f"a new one. Log: {rank.log_path}"
    )


def _no_memory(
    config: GroupConfig, rank: Rank, failed: Failed, doing: str | None
) -> RankMemoryError:
    if config.devices:
        place = f"GPU {config.devices[rank.index]}"
    else:
        place = "the host" if config.device == "cpu" else f"the GPU of {rank.place}"
    found = ((_ASKED, "asked for"), (_HELD, "held"))
    matches = [(pattern.search(failed.message), word) for pattern, word in found]
    amounts = ", ".join(f"{match[1]} {word}" for match, word in matches if match)
    advice, others = "", _held_by_others(failed.message)
    if others > _BY_OTHERS_GIB:
        amounts += f"; other processes, ComfyUI or another program, hold about {others:.1f} GiB"
        advice = (
            ". Or end the other program (nvidia-smi shows it), or leave that GPU out: 'devices' of "
            "the loader, or the setting 'GPUs to use'"
        )
    elif config.device == "cuda":
        advice = ", or have less of the weights on each GPU (TP_RUNTIME_GPU_MEMORY)"
    return RankMemoryError(
        f"Rank {rank.index} ran out of memory on {place}{_during(doing)} "
        f"({amounts or failed.message}). Use more GPUs (gpu_count), a smaller size, fewer frames "
        f"or a smaller batch, or a model file in fp8 or int8{advice}. The group was ended, "
        "which freed what it held; the next request starts a new one. "
        f"Log: {rank.log_path}"
    )


def _held_by_others(message: str) -> float:
    """GiB of a GPU that are neither free nor this process's, in torch's words; 0 if unknown."""
    of_gpu, held = _OF_GPU.search(message), _HELD.search(message)
    if not of_gpu or not held:
        return 0.0
    total, free, own = (
        float(number) * _UNITS.get(unit, 0.0)
        for number, unit in (one.split() for one in (*of_gpu.groups(), held[1]))
    )
    return total - free - own


def latent_not_finite(num_bad: int, asked: Sequence[Asked]) -> InputError:
    """For evaluations of latents that have ``num_bad`` values that are no numbers."""
    total = sum(latent.numel() for one in asked for latent in tensors_in(one.inputs["x"]))
    return InputError(
        f"{num_bad} of the {total} values of the latent are NaN or infinite"
        f"{_at_timestep(asked[0])}. At the first step the latent that was given to the sampler is "
        "broken; at a later one the model overflowed: set weight_dtype to bf16 or fp32."
    )


def not_finite(num_bad: int, asked: Sequence[Asked]) -> NotFiniteError:
    """For evaluations whose results have ``num_bad`` values that are no numbers."""
    total = sum(math.prod(shape) for one in asked for shape in one.result_shapes)
    dtype = dtype_name(next(tensors_in(asked[0].inputs["x"])).dtype)
    advice = "Set weight_dtype of 'Load Diffusion Model (TP)' to bf16 or fp32."
    if dtype != "float16":
        advice = "Lower the strength of LoRAs and ControlNets, or download the model again."
    return NotFiniteError(
        f"{num_bad} of the {total} values of the model's result are NaN or infinite"
        f"{_at_timestep(asked[0])}. The model overflowed in {dtype}, or its conditioning or "
        f"weights are no numbers. {advice}"
    )


def changed_in_place() -> InputError:
    """For an evaluation with other constant inputs than those that it was known to have."""
    return InputError(
        "The conditioning was changed while it was sampled with: a custom node has written into a "
        "tensor that earlier steps were computed with. The result was not used. Queue the prompt "
        "again: from now on every step's conditioning is looked at before the step is computed."
    )


def let_go() -> TPRuntimeError:
    """For a sampling whose cancel was taken back after the GPU's stream had been let go for it."""
    return TPRuntimeError(
        "The sampling was cancelled while it waited for a result, which it has gone on without. "
        "Nothing of it was used. Queue the prompt again."
    )


def _at_timestep(asked: Asked) -> str:
    times = next(tensors_in(asked.inputs.get("timesteps")), None)  # none: of a caption
    return "" if times is None else f", at timestep {times.flatten()[0].item():.4g}"


def _during(doing: str | None) -> str:
    return "" if doing is None else f" during '{doing}'"
