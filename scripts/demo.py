"""The pack at work on any machine: a real ComfyUI, a tiny model, two ranks.

Runs the same prompt with ComfyUI's own nodes on its native model and with Load Diffusion Model (TP)
and TP Sampler on a process group of two ranks, and compares the latents. On a machine with no GPU
the ranks compute on the CPU. `make demo` runs this; `make serve` adds `--serve`.
"""

import argparse
import contextlib
import re
import shutil
import signal
import sys
import time
from collections.abc import Callable
from dataclasses import dataclass, replace
from pathlib import Path

REPOSITORY = Path(__file__).resolve().parent.parent
sys.path.insert(0, str(REPOSITORY / "tests"))

import torch  # noqa: E402

from support.comfy_server import ComfyServer, History  # noqa: E402
from support.leaks import nothing_left_over  # noqa: E402
from support.tiny_models import (  # noqa: E402
    FluxSize,
    write_flux,
    write_qwen_image,
    write_z_image,
)
from support.tiny_vae import (  # noqa: E402
    VAE_NAME,
    WAN_VAE_NAME,
    write_tiny_vae,
    write_tiny_wan_vae,
)
from support.workflows import (  # noqa: E402
    Prompt,
    Sampling,
    node,
    stock_twin,
    text_to_latent,
    tp_loader,
    with_picture,
)

NUM_RANKS = 2
TOLERANCE = 1e-4
SAMPLING = Sampling(seed=42, steps=8, cfg=2.0, width=256, height=256)
PICTURE = REPOSITORY / "out" / "demo.png"


@dataclass(frozen=True)
class Demo:
    """What is run of a model family: a tiny file, the VAE of its latents, how it is sampled."""

    write_model: Callable[[Path], Path]
    write_vae: Callable[[Path], None] = write_tiny_vae
    vae_name: str = VAE_NAME
    sampling: Sampling = SAMPLING

    def install(self, models: Path) -> None:
        """Give a server the two files."""
        self.write_model(models / "diffusion_models" / self.model_name)
        self.write_vae(models)

    @property
    def model_name(self) -> str:
        return f"tiny_{self.write_model.__name__.removeprefix('write_')}.safetensors"

    def prompt(self, seed: int) -> Prompt:
        """TP Sampler on two ranks, decoded to a picture by the stock nodes."""
        sampling = replace(self.sampling, seed=seed)
        prompt = text_to_latent(tp_loader(self.model_name, NUM_RANKS), "TPSampler", sampling)
        return with_picture(prompt, self.vae_name)


DEMOS = {
    "z_image": Demo(write_z_image),
    "flux": Demo(write_flux, sampling=replace(SAMPLING, pooled_width=FluxSize().vector_dim)),
    "qwen_image": Demo(write_qwen_image, write_tiny_wan_vae, WAN_VAE_NAME),
}


def run(server: ComfyServer, title: str, prompt: Prompt) -> History:
    """Run a prompt and print how long it took, from the request to the finished picture."""
    server.events.clear()
    start = time.perf_counter()
    history = server.run(prompt)
    e2e_time_ms = (time.perf_counter() - start) * 1000
    progress = [event.data for event in server.events.all("progress")]
    num_steps = sum(data["max"] == SAMPLING.steps for data in progress)  # not the loading's
    num_previews = len(server.events.all("preview"))
    print(
        f"{title:<42} e2e_time_ms={e2e_time_ms:<8.0f} {num_steps} steps, {num_previews} previews",
        flush=True,
    )
    return history


def world_size(server: ComfyServer) -> int:
    """The TP world size that the ranks themselves report through TPRuntimeInfo."""
    report = server.run({"info": node("TPRuntimeInfo")}).text("info")
    match = re.search(r"tp_world_size\W+(\d+)", report)
    if match is None:
        raise SystemExit(f"TPRuntimeInfo names no tp_world_size:\n{report}")
    return int(match[1])


def largest_difference(latent: torch.Tensor, reference: torch.Tensor) -> float:
    """Largest absolute difference, relative to the reference's standard deviation."""
    return float((latent - reference).abs().max() / reference.std())


def compare(server: ComfyServer, demo: Demo) -> bool:
    """Run both ways, print the report, and say whether they agree."""
    prompt = demo.prompt(SAMPLING.seed)
    stock = run(server, "KSampler, native model", stock_twin(prompt))
    sharded = run(server, f"TP Sampler, {NUM_RANKS} ranks (starts them)", prompt)
    run(server, "TP Sampler, same ranks, another seed", demo.prompt(SAMPLING.seed + 1))

    (picture,) = server.pictures(sharded)
    PICTURE.parent.mkdir(exist_ok=True)
    shutil.copy(picture, PICTURE)
    size = world_size(server)
    difference = largest_difference(server.latent(sharded), server.latent(stock))
    print(f"picture: {PICTURE}")
    print(f"tp_world_size={size}")
    print(f"max difference = {difference:.1e} (relative to the latent's std)", flush=True)
    return size == NUM_RANKS and difference <= TOLERANCE


def serve(server: ComfyServer, demo: Demo) -> None:
    """Keep the server up for a person until Ctrl-C."""
    print(f"ComfyUI is at {server.url} with {demo.model_name}; Ctrl-C stops it.", flush=True)
    with contextlib.suppress(KeyboardInterrupt):
        server.process.wait()


def main() -> int:
    """Run the demo, or serve; 0 when the two samplers agree and nothing is left over."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--model", default="z_image", metavar="MODEL", help=", ".join(DEMOS))
    parser.add_argument("--serve", action="store_true", help="keep ComfyUI up until Ctrl-C")
    options = parser.parse_args()
    if options.model not in DEMOS:
        print(f"MODEL={options.model}: choose one of {', '.join(DEMOS)}.", file=sys.stderr)
        return 2
    demo = DEMOS[options.model]
    # A plain `kill` stops the server and the ranks too.
    signal.signal(signal.SIGTERM, lambda *_: sys.exit(143))
    device_args = () if torch.cuda.device_count() >= NUM_RANKS else ("--cpu",)
    with nothing_left_over(), ComfyServer(extra_args=device_args) as server:
        demo.install(server.models)
        if options.serve:
            serve(server, demo)
            return 0
        agree = compare(server, demo)
    print("nothing left over: no rank process, no entry in /dev/shm")
    return 0 if agree else 1


if __name__ == "__main__":
    sys.exit(main())
