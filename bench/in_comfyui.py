"""Measures sampler steps in a real ComfyUI: the stock loader and the pack's in one run.

    python -m bench.in_comfyui --models z_image --layouts 1x1 2x2 --comfyui PATH --out bench/results

For each model a ComfyUI is started with this pack (or that of `--pack`) and a dummy file. Its
prompts are random texts, an empty latent (with sound, if the model makes it) and KSampler: first
with the stock loader on one GPU, then with Load Diffusion Model (TP) in each layout. `ms_step`:
what `--steps` more steps add to a prompt, by ComfyUI's own time stamps, for each of them; the
median of `--repeats`, each with a seed of its own. `ms_ranks`: how much of it the GPUs computed, by
their own clocks: the slowest rank. `first_prompt_s`: a prompt of `--short-steps` from cold, start
of the ranks included. `error`: the distance of the final latent from the stock loader's, relative
to its norm; the worst item's of the worst seed (of the stock loader's own row: of a second run of
one seed). A row above `bench.errors.limit` has failed. With `--exact`, `from_fp32`: its distance
from that of a ComfyUI which computes in fp32; `noise`: the stock loader's. `short_prompts_s`: the
short prompts after the first; what still had to be made ready shows there. `control`: with
a ControlNet, compared with the stock loader and that. `gpu_gib`: GPU memory of each process while
the model is loaded, by the driver's account.
The ranks' Python is `TP_RUNTIME_PYTHON`, else ComfyUI's. Rows are added to the file of the day in
`--out`, each as soon as it is there.
"""

import argparse
import functools
import importlib.metadata
import itertools
import json
import os
import signal
import socket
import statistics
import subprocess
import sys
import tempfile
import time
import urllib.error
import urllib.request
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import psutil
import torch
from safetensors.torch import load_file

from bench.controls import FOLDERS, PUBLISHED_ONLY, control_file, with_control
from bench.dummy import WEIGHTS, dummy_file, sizes_of
from bench.errors import is_wrong, relative_error
from bench.extents import Extent
from bench.inputs import latent_shapes
from bench.prompts import Prompt, node
from bench.rows import add_rows
from tp_runtime.models import families, family_named

COLUMNS = [
    "model",
    "weights",
    "layout",
    "cfg",
    "side",
    "batch",
    "ms_step",
    "ms_ranks",
    "error",
    "noise",
    "first_prompt_s",
]
START_S, PROMPT_S, STOP_S = 180, 600, 30
# A node pack of one file.
NODES = """
import json

import torch


class BenchText:
    RETURN_TYPES, FUNCTION, CATEGORY = ("CONDITIONING",), "make", "bench"

    @classmethod
    def INPUT_TYPES(cls):
        names = ("seed", "tokens", "width", "pooled")
        return {"required": {name: ("INT", {"default": 0, "max": 2**31}) for name in names}}

    def make(self, seed, tokens, width, pooled):
        generator = torch.Generator().manual_seed(seed)
        text = torch.randn(1, tokens, width, generator=generator)
        more = {"pooled_output": torch.randn(1, pooled, generator=generator)} if pooled else {}
        return ([[text, more]],)


class BenchLatent:
    RETURN_TYPES, FUNCTION, CATEGORY = ("LATENT",), "make", "bench"

    @classmethod
    def INPUT_TYPES(cls):
        return {"required": {"shapes": ("STRING", {})}}

    def make(self, shapes):
        first, *besides = [torch.zeros(shape) for shape in json.loads(shapes)]
        if besides:
            from comfy.nested_tensor import NestedTensor

            first = NestedTensor((first, *besides))
        return ({"samples": first},)


class BenchFlat:
    RETURN_TYPES, FUNCTION, CATEGORY = ("LATENT",), "make", "bench"

    @classmethod
    def INPUT_TYPES(cls):
        return {"required": {"samples": ("LATENT",)}}

    def make(self, samples):
        found = samples["samples"]
        parts = found.unbind() if found.is_nested else [found]
        return ({"samples": torch.cat([part.flatten(1) for part in parts], dim=1)},)


class BenchPicture:
    RETURN_TYPES, FUNCTION, CATEGORY = ("IMAGE",), "make", "bench"

    @classmethod
    def INPUT_TYPES(cls):
        return {"required": {name: ("INT", {"max": 2**31}) for name in ("width", "height")}}

    def make(self, width, height):
        generator = torch.Generator().manual_seed(0)
        return (torch.rand(1, height, width, 3, generator=generator),)


class RandomVAE:
    def spacial_compression_encode(self):
        return 8

    def __init__(self, video):
        self.frames = (1,) * video

    def encode(self, pixels):
        count, height, width = pixels.shape[:3]
        generator = torch.Generator().manual_seed(0)
        shape = (count, 16, *self.frames, height // 8, width // 8)
        return torch.randn(shape, generator=generator)


class BenchVAE:
    RETURN_TYPES, FUNCTION, CATEGORY = ("VAE",), "make", "bench"

    @classmethod
    def INPUT_TYPES(cls):
        return {"required": {"video": ("BOOLEAN", {})}}

    def make(self, video):
        return (RandomVAE(video),)


NODE_CLASS_MAPPINGS = {
    one.__name__: one for one in (BenchText, BenchLatent, BenchFlat, BenchPicture, BenchVAE)
}
"""
# And for the small file of `bench.dummy`: the sizes that ComfyUI does not look for in a file.
SMALL_SIZES = """
from comfy import model_detection, supported_models


def detect(*args, stock=model_detection.model_config_from_unet, **options):
    config = stock(*args, **options)
    kind = getattr(supported_models, {kind!r}, type(config))
    return kind(config.unet_config | {sizes!r})


model_detection.model_config_from_unet = detect
"""


class PromptError(Exception):
    """ComfyUI refused a prompt, or a node raised."""


class Server:
    """A ComfyUI that runs in a folder."""

    def __init__(self, base: Path, command: list[str], args: argparse.Namespace) -> None:
        with socket.socket() as listener:
            listener.bind(("127.0.0.1", 0))
            port = listener.getsockname()[1]
        self.base, self.url = base, f"http://127.0.0.1:{port}"
        # With bytecode, as where ComfyUI has run before: imports take a third of the time.
        variables = {"PYTHONUNBUFFERED": "1", "PYTHONDONTWRITEBYTECODE": ""}
        if args.cpu:
            variables |= {"CUDA_VISIBLE_DEVICES": "", "OMP_NUM_THREADS": "1"}
        with (base / "log").open("wb") as log:
            self.process = subprocess.Popen(
                [*command, "--port", str(port)],
                cwd=args.comfyui,
                env=os.environ | variables,
                stdin=subprocess.DEVNULL,
                stdout=log,
                stderr=subprocess.STDOUT,
                # A shell has what it runs in the background ignore the signal.
                preexec_fn=functools.partial(signal.signal, signal.SIGINT, signal.SIG_DFL),
            )

    def ask(self, path: str, body: dict[str, Any] | None = None, within_s: float = 0) -> Any:
        """GET, or POST where there is a body; again until there is an answer."""
        data = None if body is None else json.dumps(body).encode()
        deadline = time.monotonic() + within_s
        while True:
            if self.process.poll() is not None:
                raise RuntimeError(f"ComfyUI ended with code {self.process.returncode}")
            request = urllib.request.Request(self.url + path, data)
            request.add_header("Content-Type", "application/json")
            try:
                with urllib.request.urlopen(request, timeout=60) as reply:
                    answer = json.loads(reply.read() or "null")
            except urllib.error.HTTPError as error:
                raise PromptError(f"{path}: {error.read().decode()}") from error
            except urllib.error.URLError as error:
                answer = error
            if answer != {} and not isinstance(answer, Exception):
                return answer
            if time.monotonic() > deadline:
                raise TimeoutError(f"{path}: {answer} after {within_s} s")
            time.sleep(0.1)

    def run(self, prompt: Prompt) -> tuple[float, dict[str, Any]]:
        """Seconds from a prompt's start to its end, and what its nodes put out."""
        prompt_id = self.ask("/prompt", {"prompt": prompt})["prompt_id"]
        entry = self.ask(f"/history/{prompt_id}", within_s=PROMPT_S)[prompt_id]
        messages = dict(entry["status"]["messages"])
        if "execution_success" not in messages:
            raise PromptError(messages.get("execution_error", {}).get("exception_message"))
        start, end = (messages[f"execution_{name}"]["timestamp"] for name in ("start", "success"))
        return (end - start) / 1000, entry["outputs"]

    def sample(self, prompt: Prompt, **sampler: Any) -> tuple[float, torch.Tensor]:
        """The prompt with more inputs for its sampler: seconds, and the final latent."""
        inputs = prompt["sampler"]["inputs"] | sampler
        seconds, outputs = self.run(prompt | {"sampler": node("KSampler", **inputs)})
        (file,) = outputs["save"]["latents"]
        latent = load_file(self.base / "output" / file["subfolder"] / file["filename"])
        return seconds, latent["latent_tensor"]

    def evaluations_ms(self) -> float:
        """How long all evaluations so far took the ranks, the slowest of them; 0 without any."""
        groups = self.ask("/tensor_parallel/groups")["groups"]
        return max((rank["evaluation_ms"] for one in groups for rank in one["ranks"]), default=0.0)

    def clear(self) -> None:
        """End the groups, free all models. What is asked while it collects garbage may be lost."""
        self.run({"release": node("TPReleaseRuntime")})
        for _ in range(3):
            self.ask("/free", {"unload_models": True, "free_memory": True})
            time.sleep(0.7)


@contextmanager
def comfyui(
    args: argparse.Namespace, model: str, files: Mapping[str, Path], *options: str
) -> Iterator[Server]:
    """A server that is up; ``files``: by the folder of its models that each is in.

    ``options``: more of ComfyUI's. If something goes wrong the end of its log is shown.
    """
    with tempfile.TemporaryDirectory(prefix="bench-comfyui-") as name:
        base = Path(name)
        for folder in ("custom_nodes", "input", "output", "user", "web"):
            (base / folder).mkdir(parents=True)
        for folder, file in files.items():
            (base / "models" / folder).mkdir(parents=True)
            (base / "models" / folder / file.name).symlink_to(file.resolve())
        (base / "custom_nodes/tensor-parallel").symlink_to(args.pack.resolve())
        small = family_named(model).small.for_comfyui()
        sizes = SMALL_SIZES.format(kind=family_named(model).comfyui_class or "", sizes=small)
        (base / "custom_nodes/bench.py").write_text(NODES + sizes * args.small)
        (base / "web/index.html").touch()
        command = [args.python, "main.py", "--base-directory", name, "--front-end-root"]
        command += [f"{base}/web", "--database-url", f"sqlite:///{base}/user/comfyui.db"]
        command += ["--disable-api-nodes", "--preview-method", args.previews, *["--cpu"] * args.cpu]
        command += options
        server = Server(base, command, args)
        try:
            server.ask("/system_stats", within_s=START_S)
            yield server
        except BaseException:
            print("\n".join((base / "log").read_text(errors="replace").splitlines()[-60:]))
            raise
        finally:
            server.process.send_signal(signal.SIGINT)
            try:
                server.process.wait(STOP_S)
            except subprocess.TimeoutExpired:
                server.process.kill()


def make_prompt(args: argparse.Namespace, row: dict[str, Any], file: str) -> Prompt:
    """The prompt of a row, without seed and steps."""
    if row["layout"] == "stock":
        loader = node("UNETLoader", unet_name=file, weight_dtype="default")
    else:
        options = {"weight_dtype": "default", "gpu_count": "auto", "layout": row["layout"]}
        loader = node("TPLoadDiffusionModel", unet_name=file, **options)
    sizes = sizes_of(row["model"], args.small)
    inputs = sizes.inputs
    width = dict(axis for axis in inputs["context"].axes if isinstance(axis, tuple))["width"]
    pooled = inputs["y"].axes[-1].length if "y" in inputs else 0
    shapes = latent_shapes(row["model"], sizes, args.side, args.batch)
    links = {name: [name, 0] for name in ("model", "positive", "negative")}
    links |= {"latent_image": ["latent", 0]}
    schedule = {"sampler_name": row["sampler"], "scheduler": "simple", "denoise": 1.0}
    positive, negative = (
        node("BenchText", seed=seed, tokens=tokens, width=width, pooled=pooled)
        for seed, tokens in enumerate(row["texts"])
    )
    return {
        "model": loader,
        "positive": positive,
        "negative": negative,
        "latent": node("BenchLatent", shapes=json.dumps(shapes)),
        "sampler": node("KSampler", cfg=row["cfg"], **links, **schedule),
        "flat": node("BenchFlat", samples=["sampler", 0]),
        "save": node("SaveLatent", samples=["flat", 0], filename_prefix="latents/bench"),
    }


def measure(
    server: Server,
    prompt: Prompt,
    args: argparse.Namespace,
    stock: list[torch.Tensor],
    exact: list[torch.Tensor],
) -> dict[str, Any]:
    """A row's numbers.

    ``stock``: the stock loader's latents, which its row puts there. ``exact``: those in fp32, if
    they were computed.
    """
    is_stock = prompt["model"]["class_type"] == "UNETLoader"
    if not is_stock and not stock:
        raise PromptError("the stock loader has no result to compare with")
    server.clear()
    first_s, _ = server.sample(prompt, seed=args.repeats, steps=args.short_steps)
    long_steps = args.short_steps + args.steps
    times, of_ranks, shorts_s, latents = [], [], [], []
    for seed in range(args.repeats):
        short_ms, short_ranks_ms, _ = timed(server, prompt, seed, args.short_steps)
        long_ms, long_ranks_ms, latent = timed(server, prompt, seed, long_steps)
        if not latent.isfinite().all():
            raise PromptError("the latent is not finite")
        times.append(round((long_ms - short_ms) / args.steps, 2))
        of_ranks.append(round((long_ranks_ms - short_ranks_ms) / args.steps, 2))
        shorts_s.append(round(short_ms / 1000, 2))
        latents.append(latent)
    gpu_gib = {} if args.cpu else gpu_memory(server.process.pid)
    row = {"ms_step": round(statistics.median(times), 2), "ms_steps": times, "gpu_gib": gpu_gib}
    row["short_prompts_s"] = shorts_s
    if exact:
        row["from_fp32"] = worst_error(latents, exact)
        row["noise"] = worst_error(stock or latents, exact)
    if is_stock:
        stock += latents
        server.clear()  # or ComfyUI would give what it has
        latents = [server.sample(prompt, seed=0, steps=long_steps)[1]]  # how far it is from itself
    else:
        row["ms_ranks"] = round(statistics.median(of_ranks), 2)
    row["error"] = worst_error(latents, stock)
    return row | {"first_prompt_s": round(first_s, 1)}


def timed(
    server: Server, prompt: Prompt, seed: int, steps: int
) -> tuple[float, float, torch.Tensor]:
    """Milliseconds of a prompt, those of its evaluations by the ranks, and the final latent."""
    before = server.evaluations_ms()
    seconds, latent = server.sample(prompt, seed=seed, steps=steps)
    return 1000 * seconds, server.evaluations_ms() - before, latent


def worst_error(latents: Sequence[torch.Tensor], expected: Sequence[torch.Tensor]) -> float:
    """Of those that both have, to three digits."""
    return float(f"{max(map(relative_error, latents, expected)):.2e}")


def latents_in_fp32(
    args: argparse.Namespace, row: dict[str, Any], files: Mapping[str, Path]
) -> list[torch.Tensor]:
    """What a ComfyUI that computes in fp32 makes of the row's long prompts."""
    prompt = make_prompt(args, row | {"layout": "stock"}, files["diffusion_models"].name)
    steps = args.short_steps + args.steps
    with comfyui(args, row["model"], files, "--fp32-unet") as server:
        return [server.sample(prompt, seed=seed, steps=steps)[1] for seed in range(args.repeats)]


def gpu_memory(server_pid: int) -> dict[str, float]:
    """GiB that ComfyUI and the ranks hold, over all GPUs that they may use, by their names."""
    query = ["nvidia-smi", "--query-compute-apps=pid,used_memory", "--format=csv,noheader,nounits"]
    if visible := os.environ.get("CUDA_VISIBLE_DEVICES"):
        query.append(f"--id={visible}")  # others may be at work on the rest
    found: dict[str, float] = {}
    for line in subprocess.check_output(query, text=True).splitlines():
        pid, mib = line.split(", ")
        title = "comfyui" if int(pid) == server_pid else psutil.Process(int(pid)).cmdline()[0]
        name = title.removeprefix("tp_runtime.rank.worker: ").partition(" in ")[0]
        found[name] = round(found.get(name, 0) + int(mib) / 1024, 2)
    return dict(sorted(found.items()))


def rows_of(args: argparse.Namespace, model: str, weights: str) -> Iterator[dict[str, Any]]:
    """The rows of a file as they are measured; of a layout that fails, one with its ``failed``."""
    file = dummy_file(model, args.folder, args.small, weights)
    tokens = args.tokens or [family_named(model).text_tokens]
    files = {"diffusion_models": file}
    if args.control:
        files[FOLDERS[model]] = control_file(model, args.folder, args.small)
    asked = {
        "model": model,
        "weights": weights,
        "cfg": args.cfg or (1.0 if "guidance" in family_named(model).published.inputs else 4.0),
        "side": args.side.side,
        "batch": args.batch,
        "texts": [tokens[0], tokens[-1]],
        "sampler": args.sampler,
        "previews": args.previews,
    }
    exact = latents_in_fp32(args, asked, files) if args.exact else []
    with comfyui(args, model, files) as server:
        stats = server.ask("/system_stats")
        device, *_ = stats["devices"]  # cuda:0 NVIDIA H100 : cudaMallocAsync
        name = "cpu" if args.cpu else device["name"].partition(" ")[2].partition(" :")[0]
        known = {"where": "comfyui", "device": name, "commit": args.commit}
        known |= {of: importlib.metadata.version(of) for of in ("torch", "vllm", "diffusers")}
        known["comfyui"] = stats["system"]["comfyui_version"]
        for control in [False, True][: 1 + args.control]:
            stock: list[torch.Tensor] = []
            for layout in ["stock", *args.layouts]:
                row = known | asked | {"layout": layout, "control": control}
                prompt = make_prompt(args, row, file.name)
                if control:
                    size = {"width": args.side.width, "height": args.side.height}
                    prompt = with_control(model, prompt, files[FOLDERS[model]].name, size)
                try:
                    row |= measure(server, prompt, args, stock, exact)
                except PromptError as error:
                    row |= {"failed": str(error)}
                yield row


def main() -> int:
    """Measure, write the rows, print a table; the exit status is 1 if a layout failed."""
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawTextHelpFormatter
    )
    add = parser.add_argument
    known = sorted(families())
    add("--models", nargs="+", choices=known, default=known)
    add("--layouts", nargs="+", default=["1x1"], help="TP size x batch groups, such as 2x2")
    add("--cfg", type=float, help="default: 4, or 1 where a model is given its guidance")
    add("--side", type=Extent.parse, default="1024", help="or 832x480x81 for 81 frames")
    add("--batch", type=int, default=1)
    add("--tokens", nargs="+", type=int, help="of both texts, or of the positive and the negative")
    add("--steps", type=int, default=10)
    add("--short-steps", type=int, default=4)
    add("--repeats", type=int, default=3)
    add("--previews", choices=["none", "latent2rgb"], default="none")
    add("--sampler", default="euler", help="or res_multistep, which looks at a value at every step")
    add("--weights", nargs="+", choices=WEIGHTS, default=["bf16"], help="ComfyUI 0.33 for others")
    add(
        "--control",
        action="store_true",
        help=f"and again with a ControlNet, of {', '.join(FOLDERS)}: see bench/controls.py",
    )
    add("--exact", action="store_true", help="also in fp32, how far all are from that")
    add("--small", action="store_true", help="tiny models, to see that it works")
    add("--cpu", action="store_true", help="no GPU, for ComfyUI and the ranks")
    add("--comfyui", type=Path, default=Path(os.environ.get("COMFYUI_PATH", ".comfyui")))
    add("--python", default=sys.executable, help="the one that runs ComfyUI")
    add("--pack", type=Path, default=Path(__file__).resolve().parents[1])
    add("--folder", type=Path, default=Path(tempfile.gettempdir()))
    add("--out", type=Path)
    add("--commit", help="of the pack, where git cannot tell")
    args = parser.parse_args()
    if args.control and (without := set(args.models) - FOLDERS.keys()):
        parser.error(f"--control: there is none for {', '.join(sorted(without))}")
    if args.control and args.small and (published := set(args.models) & set(PUBLISHED_ONLY)):
        parser.error(f"--control: not with --small for {', '.join(sorted(published))}")
    if args.exact and args.control:
        parser.error("--exact: not with --control")
    if args.commit is None:
        command = ["git", "-C", str(args.pack), "rev-parse", "--short", "HEAD"]
        args.commit = subprocess.check_output(command, text=True).strip()
    rows = []
    for model, weights in itertools.product(args.models, args.weights):
        for row in rows_of(args, model, weights):
            if "failed" not in row and is_wrong(row):
                row |= {"failed": f"the error {row['error']:g} is too large: a wrong result"}
            rows.append(row)
            print(json.dumps(row), flush=True)
            if args.out and "failed" not in row:
                add_rows(args.out, [row], "-comfyui")
    for row in [{column: column for column in COLUMNS}, *rows]:
        print(" ".join(f"{row.get(column) or '':>14}" for column in COLUMNS))
    return int(any("failed" in row for row in rows))


if __name__ == "__main__":
    sys.exit(main())
