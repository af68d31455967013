"""What the process that ranks are forked from imports, and what it leaves out."""

import json
import subprocess
import sys

import pytest

from support.paths import REPOSITORY
from tp_runtime.client.launch.local import _server_environment
from tp_runtime.rank.imports import LEFT_OUT, STOOD_IN_FOR

pytestmark = [pytest.mark.process, pytest.mark.rotates(3)]

# What comes with the modules that are stood in for.
WITH_THEM = ("fastapi", "openai", "xgrammar")


def answer_of(code: str) -> list[str]:
    """What a Python prints as its last line, as JSON; with the fork server's environment."""
    done = subprocess.run(
        [sys.executable, "-c", code],
        cwd=REPOSITORY,
        env=_server_environment() | {"PYTHONPATH": str(REPOSITORY)},
        check=True,
        timeout=300,
        stdout=subprocess.PIPE,
        text=True,
    )
    return list(json.loads(done.stdout.splitlines()[-1]))


def test_what_no_rank_needs_is_left_out_and_there_afterwards() -> None:
    seen, afterwards = answer_of(
        "import importlib, json, sys\n"
        "from tp_runtime.rank import imports\n"
        "imports.import_all()\n"
        "seen = list(sys.modules)\n"
        "for name in (*imports.LEFT_OUT, *imports.STOOD_IN_FOR):\n"
        "    importlib.import_module(name)\n"
        "print(json.dumps([seen, list(sys.modules)]))"
    )
    left_out = {*LEFT_OUT, *STOOD_IN_FOR, *WITH_THEM}
    assert not left_out & set(seen)
    assert left_out <= set(afterwards)
    assert {"tp_runtime.rank.worker", "diffusers.models.transformers"} <= set(seen)
    assert {"torch._inductor.lowering", "vllm.model_executor.layers.linear"} <= set(seen)


def test_it_would_be_imported_otherwise() -> None:
    """Or its place on the list were for nothing."""
    seen = answer_of(
        "import json, sys\n"
        "from tp_runtime.rank import imports\n"
        "imports.LEFT_OUT = imports.STOOD_IN_FOR = ()\n"
        "imports.import_all()\n"
        "print(json.dumps(list(sys.modules)))"
    )
    assert {*LEFT_OUT, *STOOD_IN_FOR, *WITH_THEM} <= set(seen)


def test_a_rank_imports_none_of_vllms_servers() -> None:
    """Each would, as it joins its group: what it is configured with asks them for a class."""
    seen = answer_of(
        "import json, sys\n"
        "from tp_runtime.rank import imports\n"
        "imports.import_all()\n"
        "from vllm.config import DeviceConfig, VllmConfig\n"
        "with imports.configuring():\n"
        "    VllmConfig(device_config=DeviceConfig(device='cpu'))\n"
        "print(json.dumps(list(sys.modules)))"
    )
    assert not {"vllm.v1.executor", "opentelemetry", *WITH_THEM} & set(seen)
