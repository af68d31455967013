"""A host that is lost in the middle of a step: a clear error in time, and the next prompt."""

import re
import time
from collections.abc import Callable, Iterator
from pathlib import Path

import pytest
from faults.conftest import put
from hosts.conftest import ModelOn, cluster_of
from process.conftest import assert_ended, make_inputs

from support.ray_hosts import Cluster
from support.waiting import wait_until
from support.workers import bound_s
from tp_runtime.client import GroupDiedError, GroupStartError, RemoteModel
from tp_runtime.wire.transport import SILENCE_S

pytestmark = [pytest.mark.process, pytest.mark.hosts, pytest.mark.rotates(5, "ray")]

# Until the group has failed; and until its error is raised, since Ray has to end the others.
KILLED_BOUND_S = 5.0
CUT_OFF_BOUND_S = 10.0
RAISED_BOUND_S = 10.0


@pytest.fixture(scope="module")
def cluster() -> Iterator[Cluster]:
    """Two hosts with room for one rank each, which computes nothing."""
    with cluster_of((1, 1), light=True) as cluster:
        yield cluster


@pytest.fixture
def whole(cluster: Cluster) -> Cluster:
    """The cluster with both hosts, whatever happened before."""
    far = cluster.hosts[1]
    if far.is_cut_off:
        far.cut_off(False)
        far.kill()  # it ends by itself, when it hears that Ray has given it up: sometime
    cluster.start()
    return cluster


def lose(
    how: Callable[[], None], model: RemoteModel, faults: Path, step_s: float = 300.0
) -> tuple[str, float]:
    """A host is lost while its rank is at a step: the error, and the seconds to the failure."""
    model.ensure_loaded()
    model.evaluate(make_inputs())
    engine = model._group.engine
    assert engine is not None
    put(faults, rank=1, point="evaluate", action="delay", delay_s=step_s)
    lost_s: list[float] = []
    failed_s: list[float] = []

    def poll() -> None:
        if not lost_s and not faults.exists():  # the rank has taken it
            how()
            lost_s.append(time.monotonic())
        if not failed_s and engine.error is not None:
            failed_s.append(time.monotonic())

    with pytest.raises(GroupDiedError) as caught:
        model.evaluate(make_inputs(), poll)
    message = str(caught.value)
    noticed_after_s = failed_s[0] - lost_s[0]
    raised_after_s = time.monotonic() - failed_s[0]
    print(f"noticed after {noticed_after_s:.2f} s, raised {raised_after_s:.2f} s later: {message}")
    print(Path(message.rpartition("Log: ")[2]).read_text()[-2000:])
    assert raised_after_s <= bound_s(RAISED_BOUND_S)
    return message, noticed_after_s


def assert_works_on_what_is_left(cluster: Cluster, model_on: ModelOn) -> None:
    """One rank is enough for the next prompt; two are said to be too many."""
    one = model_on(1)
    one.ensure_loaded()
    one.evaluate(make_inputs())
    assert [len(host.ranks()) for host in cluster.hosts] == [1, 0]
    one._group.close()
    with pytest.raises(GroupStartError, match=r"2 CPU cores were asked for, .* has 1, "):
        model_on(2).ensure_loaded()


def test_killed(faults: Path, whole: Cluster, model_on: ModelOn) -> None:
    far = whole.hosts[1]
    message, seconds = lose(far.kill, model_on(2), faults)
    assert re.search(rf"Rank 1 \(process \d+ on {far.address}\) .+ during 'Evaluate'", message)
    assert seconds <= bound_s(KILLED_BOUND_S)
    assert_works_on_what_is_left(whole, model_on)


@pytest.mark.parametrize("step_s", [300.0, 2.0], ids=["at a step", "with its answer on the way"])
def test_cut_off(faults: Path, whole: Cluster, model_on: ModelOn, step_s: float) -> None:
    far = whole.hosts[1]
    model = model_on(2)
    model.ensure_loaded()
    (rank,) = far.ranks()
    message, seconds = lose(far.cut_off, model, faults, step_s)
    assert re.search(
        rf"Rank 1 \(process \d+ on {far.address}\) was not heard of for {SILENCE_S} s: its host is "
        "down, or cut off from the network during 'Evaluate'",
        message,
    )
    assert seconds <= bound_s(CUT_OFF_BOUND_S)
    assert_ended([rank.pid], within_s=bound_s(CUT_OFF_BOUND_S))  # by itself: nobody can reach it
    assert_works_on_what_is_left(whole, model_on)


def test_a_host_comes_back(faults: Path, whole: Cluster, model_on: ModelOn) -> None:
    model = model_on(2)
    model.ensure_loaded()
    model.evaluate(make_inputs())
    wait_until(lambda: [len(host.ranks()) for host in whole.hosts] == [1, 1])
