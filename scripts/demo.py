"""The pack at work on any machine: a real ComfyUI, a small model, groups of ranks.

Runs the same prompt with ComfyUI's own nodes on its native model and with Load Diffusion Model (TP)
and TP Sampler on process groups, compares the latents and keeps the pictures in `out`. Z-Image is
the toy of `examples/shapes`, which draws what the prompt says; the other models have random
weights. On a machine with no GPU the ranks compute on the CPU. `make demo` runs this; `make serve`
adds `--serve`. With `--where ray`, each group's ranks are actors of a Ray that is started for them.
"""

import argparse
import contextlib
import shutil
import signal
import sys
import time
from collections.abc import Callable
from dataclasses import dataclass, replace
from pathlib import Path

REPOSITORY = Path(__file__).resolve().parent.parent
sys.path[:0] = [str(REPOSITORY / "tests"), str(REPOSITORY)]

import torch  # noqa: E402

from examples.shapes.scenes import Scene, prompts  # noqa: E402
from support import toy  # noqa: E402
from support.comfy_server import ComfyServer, History  # noqa: E402
from support.group_reports import rank_pids  # noqa: E402
from support.leaks import nothing_left_over, own_temporary_folder  # noqa: E402
from support.paths import TEST_PACK, TOY_PACK  # noqa: E402
from support.ray_leaks import no_ray_left_over  # noqa: E402
from support.tiny_models import tiny, write_tiny  # noqa: E402
from support.tiny_vae import (  # noqa: E402
    FLUX2_VAE_NAME,
    VAE_NAME,
    WAN_VAE_NAME,
    write_tiny_flux2_vae,
    write_tiny_vae,
    write_tiny_wan_vae,
)
from support.workflows import (  # noqa: E402
    Prompt,
    Sampling,
    node,
    on_gpus_of,
    stock_twin,
    text_to_latent,
    tp_loader,
    with_picture,
    with_report,
)
from tp_runtime.client import WHERE  # noqa: E402

TOLERANCE = 1e-4
SAMPLING = Sampling(seed=42, steps=8, cfg=2.0, width=256, height=256)
OUT = REPOSITORY / "out"


class Toy:
    """The trained one: its pictures show the prompt."""

    model_name = toy.MODEL
    pack = TOY_PACK  # brings its files
    group_sizes = (1, 2, 4)
    scene = Scene(size="", colour="red", shape="circle", place="middle", background="blue")
    text = next(prompts(scene))

    def install(self, models: Path) -> None:
        pass

    def prompt(self, num_ranks: int, seed: int = SAMPLING.seed) -> Prompt:
        return toy.toy_prompt(self.text, num_ranks, replace(toy.SAMPLING, seed=seed))

    def picture_is_right(self, picture: Path) -> bool:
        """Whether the picture shows the prompt; prints what it shows."""
        scene = toy.shown(picture)
        print(f"  shows: {scene and next(prompts(scene))}; asked for: {self.text}")
        return scene == self.scene


@dataclass(frozen=True)
class Tiny:
    """A tiny file of a family with random weights, and a VAE of its latents."""

    family: str
    write_vae: Callable[[Path], None]
    vae_name: str
    sampling: Sampling = SAMPLING
    pack = TEST_PACK
    group_sizes = (2,)

    @property
    def model_name(self) -> str:
        return f"tiny_{self.family}.safetensors"

    def install(self, models: Path) -> None:
        write_tiny(self.family, models / "diffusion_models" / self.model_name)
        self.write_vae(models)

    def prompt(self, num_ranks: int, seed: int = SAMPLING.seed) -> Prompt:
        loader = tp_loader(self.model_name, num_ranks)
        prompt = text_to_latent(loader, "TPSampler", replace(self.sampling, seed=seed))
        return with_picture(prompt, self.vae_name)

    def picture_is_right(self, _picture: Path) -> bool:
        return True  # noise


DEMOS: dict[str, Toy | Tiny] = {
    "z_image": Toy(),
    "flux": Tiny(
        "flux",
        write_tiny_vae,
        VAE_NAME,
        replace(SAMPLING, pooled_width=tiny("flux").vector_dim),
    ),
    "flux2": Tiny("flux2", write_tiny_flux2_vae, FLUX2_VAE_NAME),
    "qwen_image": Tiny("qwen_image", write_tiny_wan_vae, WAN_VAE_NAME),
    "wan": Tiny("wan", write_tiny_wan_vae, WAN_VAE_NAME),
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


def keep_picture(server: ComfyServer, history: History, name: str) -> Path:
    """Copy the prompt's picture to `out`."""
    (picture,) = server.pictures(history)
    kept = OUT / f"{name}.png"
    OUT.mkdir(exist_ok=True)
    shutil.copy(picture, kept)
    print(f"  picture: {kept}")
    return kept


def largest_difference(latent: torch.Tensor, reference: torch.Tensor) -> float:
    """Largest absolute difference, relative to the reference's standard deviation."""
    return float((latent - reference).abs().max() / reference.std())


def compare(server: ComfyServer, name: str, where: str) -> bool:
    """Run both ways, print the report, and say whether all is as it should be."""
    demo = DEMOS[name]
    good = []
    stock = run(server, "KSampler, native model", stock_twin(demo.prompt(1)))
    for size in demo.group_sizes:
        server.run({"release": node("TPReleaseRuntime")})  # the group before
        title = f"TP Sampler, {size} rank(s), started now"
        prompt = on_gpus_of(where, demo.prompt(size))
        sharded = run(server, title, with_report(prompt))
        tp_world_size = len(rank_pids(sharded, size))
        difference = largest_difference(server.latent(sharded), server.latent(stock))
        print(f"  {tp_world_size=}, max difference = {difference:.1e} (relative to latent's std)")
        picture = keep_picture(server, sharded, f"demo_{name}_{size}")
        good += [difference <= TOLERANCE, demo.picture_is_right(picture)]
    again = on_gpus_of(where, demo.prompt(size, SAMPLING.seed + 1))
    run(server, "TP Sampler, same ranks, another seed", again)
    return all(good)


def serve(server: ComfyServer, model_name: str) -> None:
    """Keep the server up for a person until Ctrl-C."""
    print(f"ComfyUI is at {server.url} with {model_name}; Ctrl-C stops it.", flush=True)
    with contextlib.suppress(KeyboardInterrupt):
        server.process.wait()


def main() -> int:
    """Run the demo, or serve; 0 when all agree and nothing is left over."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--model", default="z_image", metavar="MODEL", help=", ".join(DEMOS))
    parser.add_argument("--serve", action="store_true", help="keep ComfyUI up until Ctrl-C")
    parser.add_argument("--where", default=WHERE[0], metavar="WHERE", help=" or ".join(WHERE))
    options = parser.parse_args()
    if options.model not in DEMOS:
        print(f"MODEL={options.model}: choose one of {', '.join(DEMOS)}.", file=sys.stderr)
        return 2
    if options.where not in WHERE:
        print(f"WHERE={options.where}: choose one of {', '.join(WHERE)}.", file=sys.stderr)
        return 2
    demo = DEMOS[options.model]
    # A plain `kill` stops the server and the ranks too.
    signal.signal(signal.SIGTERM, lambda *_: sys.exit(143))
    device_args = () if torch.cuda.device_count() >= max(demo.group_sizes) else ("--cpu",)
    with (
        own_temporary_folder(),
        nothing_left_over(),
        no_ray_left_over(),
        ComfyServer(extra_args=device_args, pack=demo.pack) as server,
    ):
        demo.install(server.models)
        if options.serve:
            serve(server, demo.model_name)
            return 0
        good = compare(server, options.model, options.where)
    print("nothing left over: no rank process, no shared memory, no temporary file, nothing of Ray")
    return 0 if good else 1


if __name__ == "__main__":
    sys.exit(main())
