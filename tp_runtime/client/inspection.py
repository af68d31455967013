"""What is in model files, whose headers are read once for each version of a file."""

from functools import lru_cache

from ..config import file_version
from ..recognise import CheckpointInfo, inspect_checkpoint

KEPT = 16  # files


def checkpoint_info(path: str) -> CheckpointInfo:
    """What is in the file as it is on disk now. Raises CheckpointError as ``inspect_checkpoint``.

    ComfyUI asks before every prompt, and a load asks several times.
    """
    try:
        version = file_version(path)
    except OSError:
        return inspect_checkpoint(path)  # which says what is wrong with it
    return _info_of(path, version)


@lru_cache(KEPT)
def _info_of(path: str, version: tuple[int, int]) -> CheckpointInfo:  # noqa: ARG001
    return inspect_checkpoint(path)
