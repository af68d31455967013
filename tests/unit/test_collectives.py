"""How the GPUs of a tensor-parallel group are connected, on one host and across hosts."""

from types import SimpleNamespace

import pytest
import torch

from tp_runtime.gpu import collectives

# Rank in the group, GPU of the rank, GPUs that it sees: a group of 3 on hosts with 2 and 1.
ACROSS_HOSTS = [(0, 0, 2), (1, 1, 2), (2, 0, 1)]


class Links:
    """The machine's, as vLLM's platform tells: physical GPU = 10 + visible one."""

    def __init__(self, visible: int, nvlink: bool) -> None:
        self.visible, self.nvlink, self.asked = visible, nvlink, None

    def device_id_to_physical_device_id(self, gpu: int) -> int:
        return [10 + index for index in range(self.visible)][gpu]  # IndexError, as in vLLM

    def is_fully_connected(self, gpus: list[int]) -> bool:
        self.asked = gpus
        return self.nvlink


@pytest.fixture
def links(monkeypatch: pytest.MonkeyPatch):
    def of(
        size: int, rank: int, gpu: int, visible: int, *, nvlink: bool = True, peers: bool = True
    ) -> Links:
        found = Links(visible, nvlink)
        group = SimpleNamespace(world_size=size, rank_in_group=rank)
        monkeypatch.setattr(collectives.parallel_state, "get_tp_group", lambda: group)
        monkeypatch.setattr(collectives, "current_platform", found)
        monkeypatch.setattr(torch.cuda, "current_device", lambda: gpu)
        monkeypatch.setattr(torch.cuda, "device_count", lambda: visible)
        monkeypatch.setattr(torch.cuda, "can_device_access_peer", lambda *_: peers)
        return found

    return of


@pytest.mark.parametrize(("rank", "gpu", "visible"), ACROSS_HOSTS)
def test_a_group_across_hosts_has_no_common_memory(
    links, rank: int, gpu: int, visible: int
) -> None:
    links(3, rank, gpu, visible)
    assert collectives.nvlink() is False
    assert collectives.peer_access() is False


def test_where_nccl_may_not_use_peers_nobody_does(links, monkeypatch: pytest.MonkeyPatch) -> None:
    links(2, 0, 0, 2)
    for value, expected in (("1", False), ("0", True), ("", True)):
        monkeypatch.setenv("NCCL_P2P_DISABLE", value)
        assert collectives.nvlink() is collectives.peer_access() is expected


@pytest.mark.parametrize(
    ("gpu", "visible", "asked"),
    [(0, 4, [10, 11]), (1, 4, [10, 11]), (2, 4, [12, 13]), (3, 4, [12, 13]), (1, 2, [10, 11])],
)
def test_a_batch_group_asks_for_its_own_gpus(links, gpu: int, visible: int, asked) -> None:
    """Where the ranks see those of all batch groups, and where they see their own only."""
    found = links(2, gpu % 2, gpu, visible)
    assert collectives.nvlink() is True
    assert collectives.peer_access() is True
    assert found.asked == asked


@pytest.mark.parametrize(
    ("rank", "gpu", "visible", "asked"),
    [
        (0, 0, 4, [10, 12]),
        (1, 3, 4, [11, 13]),
        (0, 5, 8, [15, 17]),
        (0, 1, 2, None),  # the other one is on the next host
        (1, 1, 2, None),
    ],
)
def test_ranks_that_share_tokens_ask_for_their_own_gpus(
    links,
    monkeypatch: pytest.MonkeyPatch,
    rank: int,
    gpu: int,
    visible: int,
    asked: list[int] | None,
) -> None:
    """Of two groups of two GPUs each, every second one."""
    found = links(2, gpu % 2, gpu, visible)
    sharers = SimpleNamespace(world_size=2, rank_in_group=rank)
    monkeypatch.setattr(collectives.parallel_state, "get_pcp_group", lambda: sharers)
    assert collectives.nvlink_of_sharers() is (asked is not None)
    assert found.asked == asked


def test_what_is_not_connected(links) -> None:
    links(2, 0, 0, 2, nvlink=False)
    assert (collectives.nvlink(), collectives.peer_access()) == (False, True)
    links(2, 0, 0, 2, peers=False)
    assert (collectives.nvlink(), collectives.peer_access()) == (False, False)


def test_one_gpu_needs_no_link(links) -> None:
    links(1, 0, 3, 4, nvlink=False, peers=False)
    assert (collectives.nvlink(), collectives.peer_access()) == (True, True)


def test_nvlink_is_asked_of_the_gpus_themselves(links, monkeypatch: pytest.MonkeyPatch) -> None:
    """CUDA counts the fastest GPU first, NVML by the bus: visible GPU 0 is NVML's 1 here."""
    found, under_way = links(2, 0, 0, 2), []
    bus = ["GPU-slow", "GPU-fast", "GPU-medium"]
    fake = SimpleNamespace(
        NVMLError=collectives.pynvml.NVMLError,
        nvmlInit=lambda: under_way.append(1),
        nvmlShutdown=under_way.pop,
        nvmlDeviceGetHandleByUUID=lambda uuid: ("handle", uuid),
        nvmlDeviceGetIndex=lambda handle: bus.index(handle[1]),
    )
    monkeypatch.setattr(collectives, "pynvml", fake)
    names = ["fast", "medium"]
    monkeypatch.setattr(
        torch.cuda, "get_device_properties", lambda gpu: SimpleNamespace(uuid=names[gpu])
    )
    assert collectives.nvlink() is True
    assert (found.asked, under_way) == ([1, 2], [])
