"""The command line, on a tiny Z-Image."""

import re
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file, save_file

from support.diffusers_folders import write_folder
from support.gguf_files import write_gguf
from tp_runtime.client.remote_model import RemoteModel
from tp_runtime.models import families
from tp_runtime.tools import text_to_latents
from tp_runtime.tools.cli import main


def test_plan_shows_every_linear(tiny_z_image: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["plan", str(tiny_z_image), "--tp", "4"]) == 0
    shown = capsys.readouterr().out
    assert "TP sizes: 1, 2, 3, 4, 5, 6, 8" in shown
    assert "34 layers stand for 52 linears" in shown
    # 30 heads of 16, padded to 32: each of 4 ranks has 8 heads of q, k and v.
    line = next(x for x in shown.splitlines() if x.startswith("layers.0.attention.to_qkv"))
    assert re.search(r"to_q, to_k, to_v\s+QKV\s+\(480, 1440\)\s+\(480, 384\)$", line)
    assert len(re.findall(r"^rank \d: holds", shown, re.MULTILINE)) == 4


@pytest.mark.parametrize("form", ["gguf", "folder"])
def test_plan_of_other_formats(
    tiny_z_image: Path, tmp_path: Path, form: str, capsys: pytest.CaptureFixture[str]
) -> None:
    """The layers and their shards are those of the ComfyUI file with the same weights."""
    if form == "gguf":
        path = write_gguf(tiny_z_image, tmp_path / "model.gguf", "Q6_K")
    else:
        path = write_folder(tiny_z_image, tmp_path / "folder", "z_image", num_shards=2)
    tables = []
    for file in (path, tiny_z_image):
        assert main(["plan", str(file), "--tp", "2"]) == 0
        tables.append(re.findall(r"^\S.* \(.*\)$", capsys.readouterr().out, re.MULTILINE))
    assert tables[0] == tables[1]
    assert len(tables[0]) >= 34


@pytest.mark.parametrize(
    ("arguments", "words"),
    [
        (["plan", "missing.safetensors"], "missing.safetensors does not exist"),
        (["plan"], "needs a model file"),
        (["plan", "--predict"], "either a model file or --model"),
        (["plan", "--predict", "--model", "flux", "--batch", "0"], "0 latents were asked for"),
        (["plan", "--predict", "--model", "flux", "--gpu-memory", "0"], "--gpu-memory is 0.0"),
        (["plan", "--predict", "--model", "flux", "--text", "-600"], "-600 text tokens were asked"),
        (["plan", "--predict", "--model", "wan", "--frames", "0"], "0 frames were asked for"),
        (["plan", "--predict", "--model", "flux", "--frames", "5"], "makes pictures: leave it out"),
        (["plan", "--predict", "--model", "flux", "--size", "0", "0"], "--size is 0 x 0: give 8"),
        (["plan", "--predict", "--model", "flux", "--size", "-64", "64"], "--size is -64 x 64"),
        (
            ["plan", "--predict", "--model", "ltx2", "--size", "64", "16"],
            "--size is 64 x 16: give 32",
        ),
        (["text-to-latents", "missing.safetensors", "c", "o"], "does not exist"),
    ],
)
def test_a_mistake_is_one_line(
    arguments: list[str], words: str, capsys: pytest.CaptureFixture[str]
) -> None:
    assert main(arguments) == 1
    shown = capsys.readouterr().err
    assert shown.startswith("error: ")
    assert words in shown
    assert shown.count("\n") == 1


@pytest.mark.parametrize(
    ("conditioning", "output", "options", "words"),
    [
        ("text", "o", [], "c.safetensors is no safetensors file"),
        ("other", "o", [], "'context', of shape (batch, tokens, width), must be among them"),
        ("right", "none/o", [], "none. Make it, or give a file"),
        ("right", "c.safetensors/o", [], "there is no folder"),
        ("right", ".", [], "is a folder: give a file to write"),
        ("right", "o", ["--steps", "0"], "0 steps were asked for: give 1 or more"),
        ("right", "o", ["--frames", "-1"], "-1 frames were asked for: give 1 or more"),
    ],
)
def test_text_to_latents_refuses_before_it_loads(
    tiny_z_image: Path,
    tmp_path: Path,
    capsys: pytest.CaptureFixture[str],
    monkeypatch: pytest.MonkeyPatch,
    conditioning: str,
    output: str,
    options: list[str],
    words: str,
) -> None:
    monkeypatch.delattr(text_to_latents, "Runtime")
    file = tmp_path / "c.safetensors"
    if conditioning == "text":
        file.write_text("a caption")
    else:
        name = "context" if conditioning == "right" else conditioning
        save_file({name: torch.zeros(1, 20, 64)}, file)
    files = [str(path) for path in (tiny_z_image, file, tmp_path / output)]
    assert main(["text-to-latents", *files, *options]) == 1
    shown = capsys.readouterr().err
    assert shown.startswith("error: ")
    assert words in shown
    assert shown.count("\n") == 1


@pytest.mark.parametrize("locked", [".", "old"])
def test_text_to_latents_refuses_an_output_that_it_may_not_write(
    tmp_path: Path,
    capsys: pytest.CaptureFixture[str],
    monkeypatch: pytest.MonkeyPatch,
    locked: str,
) -> None:
    """Into the folder of others, or over such a file. The system refuses root neither."""
    output = tmp_path / "old"
    output.touch()
    monkeypatch.setattr("os.access", lambda path, _: path != tmp_path / locked)
    assert main(["text-to-latents", "m", "c", str(output)]) == 1
    assert "old may not be written by this user" in capsys.readouterr().err


@pytest.mark.parametrize("of", ["file", "model"])
def test_plan_predicts_every_layout(
    tiny_z_image: Path, of: str, capsys: pytest.CaptureFixture[str]
) -> None:
    model = [str(tiny_z_image)] if of == "file" else ["--model", "z_image"]
    assert main(["plan", *model, "--predict", "--tp", "4", "--batch", "2", "--device", "H200"]) == 0
    *_, link, heads, _, _, _, _, _, _ = shown = capsys.readouterr().out.splitlines()
    assert heads.split() == [
        *("layout", "ms", "matmul", "attention", "elementwise", "links", "fixed")
    ]
    assert link.startswith("  link nvlink: ")
    layouts = [line.split() for line in shown[-6:]]
    assert [layout for layout, *_ in layouts] == [
        *("4x1", "2x2", "1x4"),
        *("2x2x1", "1x2x2", "1x4x1"),
    ]
    for _, total, *parts in layouts:
        assert float(total) == pytest.approx(sum(map(float, parts)), abs=0.3)
    links = [float(line[5]) for line in layouts]
    assert links[0] > links[1] > links[2] == 0 < links[4]


def test_plan_predicts_for_the_slowest_of_gpus_that_are_not_alike(
    capsys: pytest.CaptureFixture[str],
) -> None:
    def predicted(*devices: str) -> list[str]:
        options = [word for device in devices for word in ("--device", device)]
        command = ["plan", "--predict", "--model", "flux", "--tp", "2", "--link", "pcie-host"]
        assert main([*command, *options]) == 0
        return capsys.readouterr().out.splitlines()

    both = predicted("RTX 4090", "RTX 3090")
    assert both[-3:] == predicted("RTX 3090")[-3:] != predicted("RTX 4090")[-3:]
    assert [line.split(":")[0] for line in both[1:3]] == ["  GPU RTX 4090", "  GPU RTX 3090"]
    assert "the slowest" in both[3]
    with pytest.raises(SystemExit):
        predicted("RTX 4090", "RTX 9999")
    options = ["--device", "RTX 4090", "--device", "RTX 3090"]
    assert main(["plan", "--predict", "--model", "flux", "--tp", "3", *options]) == 1
    assert "2 GPUs are named by --device, but --tp is 3" in capsys.readouterr().err


@pytest.mark.parametrize(
    ("options", "link"),
    [
        (["--device", "RTX 4090"], "pcie-host"),
        (["--device", "RTX 5090"], "pcie5-host"),
        (["--device", "RTX 5090", "--link", "pcie"], "pcie"),
        (["--device", "H100"], "nvlink"),
    ],
)
def test_plan_predicts_for_the_link_of_a_card(
    capsys: pytest.CaptureFixture[str], options: list[str], link: str
) -> None:
    assert main(["plan", "--predict", "--model", "flux", *options]) == 0
    _, device, of_link, _, *layouts = capsys.readouterr().out.splitlines()
    assert device.startswith(f"  GPU {options[1]}: ")
    assert of_link.startswith(f"  link {link}: ")
    assert [line.split()[0] for line in layouts] == ["2x1", "1x2", "1x2x1"]


def test_plan_predicts_for_less_memory(
    capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    command = ["plan", "--predict", "--model", "flux", "--device", "RTX 4090"]

    def predicted(*options: str) -> dict[str, list[str]]:
        assert main([*command, *options]) == 0
        *_, held, heads, tp, _, sharing = capsys.readouterr().out.splitlines()
        assert ("streaming" in heads) == ("what a GPU does not hold" in held)
        return {line.split()[0]: line.split()[1:] for line in (tp, sharing)}

    whole, less = predicted(), predicted("--gpu-memory", "10")
    assert less["2x1"][1:6] == whole["2x1"][1:6]
    assert 0 <= float(less["2x1"][6]) < 1  # hidden
    assert less["2x1"][7:] == ["holds", "10.0", "GiB,", "reads", "1.3", "GiB"]
    assert float(less["1x2x1"][0]) > float(less["2x1"][0]) > float(whole["1x2x1"][0])
    assert less["1x2x1"][7:] == ["holds", "10.0", "GiB,", "reads", "12.6", "GiB"]
    monkeypatch.setenv("TP_RUNTIME_GPU_MEMORY", "10")
    assert predicted() == less
    assert main([*command, "--gpu-memory", "0.1"]) == 0
    assert "1x2x1 FLUX.1 needs at least 0.49 GiB of each GPU" in capsys.readouterr().out


def heading(capsys: pytest.CaptureFixture[str], *options: str) -> str:
    assert main(["plan", "--predict", "--device", "H200", *options]) == 0
    return capsys.readouterr().out.partition(", batch")[0]


@pytest.mark.parametrize("model", sorted(families()))
def test_plan_predicts_what_the_model_usually_makes(
    capsys: pytest.CaptureFixture[str], model: str
) -> None:
    width, height, frames = families()[model].extents[0]
    of_frames = f" x {frames} frames" if frames > 1 else ""
    usual = f"{families()[model].label}, {width} x {height}{of_frames}"
    assert heading(capsys, "--model", model) == usual


def test_plan_says_the_frames_of_a_video(
    tiny_z_image: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    wan = "--model", "wan"
    assert heading(capsys, *wan, "--size", "1280", "720") == "Wan, 1280 x 720 x 81 frames"
    assert heading(capsys, *wan, "--frames", "5") == "Wan, 832 x 480 x 5 frames"
    assert heading(capsys, *wan, "--frames", "1") == "Wan, 832 x 480 x 1 frame"
    picture = ["--frames", "1", "--size", "512", "512"]
    assert heading(capsys, str(tiny_z_image), *picture) == "Z-Image, 512 x 512"


@pytest.mark.parametrize(
    ("device", "said", "is_faster"),
    [
        ("RTX 4090", "carries 8 bits; measured for FLUX.1 on two H200s only", True),
        ("H200", "what it does in any", False),
    ],
)
def test_plan_predicts_8_bits(
    capsys: pytest.CaptureFixture[str], device: str, said: str, is_faster: bool
) -> None:
    command = ["plan", "--predict", "--model", "flux", "--device", device, "--precision"]
    times = {}
    for precision in ("exact", "fast"):
        assert main([*command, precision]) == 0
        *heads, tp, _, sharing = capsys.readouterr().out.splitlines()
        assert any(said in line for line in heads) == (precision == "fast")
        times[precision] = [float(line.split()[1]) for line in (tp, sharing)]
    assert (times["fast"] == times["exact"]) == (not is_faster)
    if is_faster:  # of a slow card, attention hides what ranks that share tokens exchange
        assert times["fast"][0] < times["exact"][0]


@pytest.mark.parametrize(
    ("size", "words"),
    [("7", "num_heads=30"), ("0", "size of 0 was asked for"), ("-1", "size of -1 was asked for")],
)
def test_a_size_that_cannot_work(
    tiny_z_image: Path, capsys: pytest.CaptureFixture[str], size: str, words: str
) -> None:
    assert main(["plan", str(tiny_z_image), "--tp", size]) == 1
    assert words in capsys.readouterr().err


def test_text_to_latents_refuses_a_size_before_it_loads(
    tiny_z_image: Path,
    tmp_path: Path,
    capsys: pytest.CaptureFixture[str],
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.delattr(RemoteModel, "ensure_loaded")
    conditioning = tmp_path / "c.safetensors"
    save_file({"context": torch.zeros(1, 20, 64)}, conditioning)
    files = [str(tiny_z_image), str(conditioning), str(tmp_path / "o")]
    assert main(["text-to-latents", *files, "--size", "0", "64"]) == 1
    assert capsys.readouterr().err == "error: --size is 0 x 64: give 8 pixels or more for each.\n"


@pytest.mark.process
def test_text_to_latents_is_the_same_on_two_ranks_and_one(
    tiny_z_image: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    conditioning, output = tmp_path / "c.safetensors", tmp_path / "o.safetensors"
    save_file({"context": torch.randn(1, 20, 64)}, conditioning)
    arguments = ["text-to-latents", str(tiny_z_image), str(conditioning), str(output)]
    arguments += ["--size", "128", "96", "--steps", "3", "--dtype", "float32", "--compare"]
    assert main(arguments) == 0
    shown = capsys.readouterr().out
    assert load_file(output)["samples"].shape == (1, 16, 12, 16)
    assert "tp_world_size=2" in shown
    difference = re.search(r"max difference to tp_size=1: (\S+)", shown)
    assert difference is not None
    assert float(difference[1]) <= 1e-4
