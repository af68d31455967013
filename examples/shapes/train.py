"""Trains the toy: a Z-Image that draws coloured shapes, its decoder and its words.

    python -m examples.shapes.train --device cuda

Needs torch, numpy and safetensors, and draws its pictures itself. Writes three files for ComfyUI's
`models` folder and a sheet of samples, and prints how many prompts, none of them seen in training,
came out as asked. The seed decides the pictures, their order, the noise and the first weights.
"""

import argparse
import json
import math
import random
import struct
import time
import zlib
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from itertools import pairwise
from pathlib import Path
from typing import Any

import torch
import torch.nn.functional as F
from safetensors.torch import save_file
from torch import Tensor

from .check import accuracy
from .network import (
    CAPTION_TOKENS,
    LATENT_CHANNELS,
    Decoder,
    Encoder,
    Size,
    ZImage,
    encode,
    encoder_weight,
)
from .scenes import (
    COLOURS,
    PIXELS,
    PLACE_JITTER,
    PLACES,
    SHAPES,
    SIZE_JITTER,
    SIZES,
    WORDS,
    Scene,
    all_scenes,
    inside,
    prompts,
)

MODELS = Path(__file__).parent / "models"
MODEL_FILE = "diffusion_models/shapes_z_image.safetensors"
VAE_FILE = "vae/shapes_vae.safetensors"
WORDS_FILE = "text_encoders/shapes_words.safetensors"

SHIFT = 3.0  # Z-Image's in ComfyUI
SUPERSAMPLING = 3
HELD_OUT = 0.05  # of all scenes
NO_PROMPT = 0.1  # fraction of the training on an empty prompt, so that CFG works
VOCABULARY = ("", *WORDS)  # an empty prompt is one token
# FLUX's latent format in ComfyUI: (latent - shift) * scale is what the transformer sees.
VAE_SCALE, VAE_SHIFT = 0.3611, 0.1159


# --- data ---------------------------------------------------------------------------------------


def draw(scenes: Sequence[Scene], generator: torch.Generator) -> Tensor:
    """Pictures (B, 3, PIXELS, PIXELS) of 0…1, with place and size a little off at random."""
    device, count = generator.device, len(scenes)
    grid = (torch.arange(PIXELS * SUPERSAMPLING, device=device) + 0.5) / (PIXELS * SUPERSAMPLING)
    centres = torch.tensor([PLACES[scene.place] for scene in scenes], device=device)
    halves = torch.tensor([SIZES[scene.size] for scene in scenes], device=device)
    jitter = torch.rand(count, 3, generator=generator, device=device) * 2 - 1
    centres = centres + PLACE_JITTER * jitter[:, :2]
    halves = (halves + SIZE_JITTER * jitter[:, 2]).view(-1, 1, 1)
    u = (grid.view(1, 1, -1) - centres[:, 0].view(-1, 1, 1)) / halves
    v = (grid.view(1, -1, 1) - centres[:, 1].view(-1, 1, 1)) / halves
    coverage = torch.empty(count, 1, PIXELS, PIXELS, device=device)
    for shape in SHAPES:
        rows = [row for row, scene in enumerate(scenes) if scene.shape == shape]
        if rows:
            covered = inside(shape, u[rows], v[rows]).float().unsqueeze(1)
            coverage[rows] = F.avg_pool2d(covered, SUPERSAMPLING)
    colours, backgrounds = (
        torch.tensor([COLOURS[name] for name in names], device=device).view(-1, 3, 1, 1)
        for names in ([s.colour for s in scenes], [s.background for s in scenes])
    )
    return torch.lerp(backgrounds, colours, coverage)


def tokens(prompt: str) -> list[int]:
    """The prompt's words as positions in VOCABULARY, filled up with -1."""
    found = [VOCABULARY.index(word) for word in prompt.split() or [""]]
    return found + [-1] * (CAPTION_TOKENS - len(found))


@dataclass(frozen=True)
class Pool:
    """Pictures to train on: latents (N, 16, H, W) in half precision and tokens (N, 32)."""

    latents: Tensor
    tokens: Tensor

    def batches(self, size: int, generator: torch.Generator) -> Iterator[tuple[Tensor, Tensor]]:
        """Random latents and tokens, for ever; some with an empty prompt."""
        device = generator.device
        empty = torch.tensor(tokens(""), device=device)
        while True:
            rows = torch.randint(len(self.latents), (size,), generator=generator, device=device)
            silent = torch.rand(size, 1, generator=generator, device=device) < NO_PROMPT
            yield self.latents[rows].float(), torch.where(silent, empty, self.tokens[rows])


def draw_pool(
    scenes: Sequence[Scene], count: int, encoder: Tensor, seed: int, generator: torch.Generator
) -> Pool:
    """Draw `count` pictures of random scenes, each with one of its prompts."""
    chooser, device = random.Random(seed), generator.device
    ways = [(scene, [tokens(prompt) for prompt in prompts(scene)]) for scene in scenes]
    latents, words = [], []
    for start in range(0, count, 512):
        chosen = chooser.choices(ways, k=min(512, count - start))
        pictures = draw([scene for scene, _ in chosen], generator)
        latents.append(encode(pictures, encoder).half())
        words += [chooser.choice(rows) for _, rows in chosen]
    return Pool(torch.cat(latents), torch.tensor(words, device=device))


# --- training -----------------------------------------------------------------------------------


def optimise(
    name: str,
    module: torch.nn.Module,
    loss_of: Callable[[int], Tensor],
    *,
    steps: int,
    rate: float,
    minutes: float | None = None,
    after_step: Callable[[int], None] = lambda _: None,
) -> None:
    """AdamW with a warm-up and a cosine decay; fewer steps where `minutes` would not be enough."""
    device = next(module.parameters()).device
    optimiser = torch.optim.AdamW(
        module.parameters(), lr=rate, betas=(0.9, 0.98), weight_decay=0.01, fused=True
    )
    start = time.monotonic()
    total, sum_of_losses, report_every = steps, torch.zeros((), device=device), max(steps // 40, 1)
    for step in range(steps):
        if step == total:
            break
        warm_up, left = (step + 1) / min(500, total), 0.5 + 0.5 * math.cos(math.pi * step / total)
        for group in optimiser.param_groups:
            group["lr"] = rate * min(warm_up, 1.0) * left
        loss = loss_of(step)
        loss.backward()
        torch.nn.utils.clip_grad_norm_(module.parameters(), 1.0)
        optimiser.step()
        optimiser.zero_grad(set_to_none=True)
        after_step(step)
        sum_of_losses += loss.detach()
        if (step + 1) % report_every == 0:
            mean, now = sum_of_losses.item() / report_every, time.monotonic()  # .item() waits
            sum_of_losses.zero_()
            print(f"{name} step={step + 1}/{total} loss={mean:.5f} s={now - start:.0f}", flush=True)
            if step + 1 == report_every:
                measured_from = now  # the first ones compile and warm up
            elif step + 1 == 2 * report_every and minutes is not None:
                per_step = (now - measured_from) / report_every
                affordable = step + 1 + int((start + 60 * minutes - now) / per_step)
                total = max(min(steps, affordable), step + 1)


def train_decoder(
    scenes: Sequence[Scene], encoder: Tensor, options: argparse.Namespace, generator: Any
) -> Decoder:
    """A decoder that turns latents, also slightly wrong ones, into clean pictures."""
    device, chooser = generator.device, random.Random(options.seed)
    decoder = Decoder().to(device, memory_format=torch.channels_last)

    def loss_of(_: int) -> Tensor:
        pictures = draw(chooser.choices(scenes, k=options.decoder_batch), generator)
        latents = encode(pictures, encoder)
        strength = 0.15 * torch.rand(len(latents), 1, 1, 1, generator=generator, device=device)
        latents += strength * torch.randn(latents.shape, generator=generator, device=device)
        with torch.autocast(device.type, torch.bfloat16, enabled=device.type == "cuda"):
            decoded = decoder(latents.contiguous(memory_format=torch.channels_last)).float()
        return F.l1_loss(decoded, pictures) + F.mse_loss(decoded, pictures)

    optimise("decoder", decoder, loss_of, steps=options.decoder_steps, rate=1e-3)
    return decoder


def train_transformer(
    net: ZImage,
    pool: Pool,
    table: Tensor,
    options: argparse.Namespace,
    generator: torch.Generator,
    minutes: float | None,
) -> dict[str, Tensor]:
    """Flow matching; returns the average of the weights over the last steps (EMA)."""
    device, batches = generator.device, pool.batches(options.batch, generator)
    average = {key: value.detach().clone() for key, value in net.named_parameters()}
    forward = torch.compile(net) if options.compile else net

    def loss_of(_: int) -> Tensor:
        data, words = next(batches)
        noise = torch.randn(data.shape, generator=generator, device=device)
        sigma = shifted(torch.rand(len(data), generator=generator, device=device))
        noised = torch.lerp(data, noise, sigma.view(-1, 1, 1, 1))
        with torch.autocast(device.type, torch.bfloat16, enabled=device.type == "cuda"):
            velocity = forward(noised, sigma, table[words.clamp(min=0)], words >= 0)
        return F.mse_loss(velocity.float(), noise - data)

    def follow(step: int) -> None:
        weight = 1 - min(options.ema, (1 + step) / (10 + step))
        torch._foreach_lerp_(
            list(average.values()), [value.detach() for value in net.parameters()], weight
        )

    optimise(
        "transformer",
        net,
        loss_of,
        steps=options.steps,
        rate=options.rate,
        minutes=minutes,
        after_step=follow,
    )
    return average


# --- sampling -----------------------------------------------------------------------------------


def shifted(sigma: Any) -> Any:
    """A sigma of 0…1 moved towards 1, as ComfyUI's ModelSamplingDiscreteFlow does."""
    return SHIFT * sigma / (1 + (SHIFT - 1) * sigma)


@torch.no_grad()
def sample(
    net: ZImage,
    table: Tensor,
    texts: Sequence[str],
    *,
    steps: int,
    cfg: float,
    generator: torch.Generator,
) -> Tensor:
    """Latents (B, 16, H, W): ComfyUI's sampler `euler` with the scheduler `simple`."""
    device, side = generator.device, net.size.latent
    words = torch.tensor([tokens(text) for text in texts], device=device)
    empty = torch.tensor(tokens(""), device=device).expand_as(words)
    x = torch.randn(len(texts), LATENT_CHANNELS, side, side, generator=generator, device=device)
    sigmas = [shifted((1000 - int(step * 1000 / steps)) / 1000) for step in range(steps)] + [0.0]

    def velocity(x: Tensor, sigma: float, words: Tensor) -> Tensor:
        sigmas = torch.full((len(x),), sigma, device=device)
        return net(x, sigmas, table[words.clamp(min=0)], words >= 0)

    for sigma, next_sigma in pairwise(sigmas):
        predicted = velocity(x, sigma, words)
        if cfg != 1.0:
            unconditional = velocity(x, sigma, empty)
            predicted = torch.lerp(unconditional, predicted, cfg)
        x = x + (next_sigma - sigma) * predicted
    return x


@torch.no_grad()
def evaluate(
    net: ZImage,
    decoder: Decoder,
    table: Tensor,
    scenes: Sequence[Scene],
    generator: torch.Generator,
    *,
    steps: int,
    cfg: float,
) -> Tensor:
    """Sample a prompt of each scene, print how many came out, and return the pictures."""
    texts = [next(prompts(scene)) for scene in scenes]
    latents = sample(net, table, texts, steps=steps, cfg=cfg, generator=generator)
    pictures = torch.cat([decoder(part) for part in latents.split(64)]).clamp(0, 1)
    found = accuracy(list(pictures.movedim(1, -1).cpu().numpy()), scenes)
    parts = "  ".join(f"{name}={value:.1%}" for name, value in found.items())
    print(f"{len(scenes)} prompts, {steps} steps, cfg {cfg:g}: {parts}", flush=True)
    return pictures


# --- files --------------------------------------------------------------------------------------


def rounded(weights: dict[str, Tensor], dtype: torch.dtype) -> dict[str, Tensor]:
    """The weights as they will be in a file."""
    return {key: value.detach().to("cpu", dtype).contiguous() for key, value in weights.items()}


def write(path: Path, tensors: dict[str, Tensor], **metadata: str) -> None:
    """Write a safetensors file and print its size."""
    path.parent.mkdir(parents=True, exist_ok=True)
    save_file(tensors, path, metadata={"format": "pt", **metadata})
    print(f"{path}: {path.stat().st_size / 1e6:.1f} MB", flush=True)


def write_vae(path: Path, decoder: dict[str, Tensor]) -> None:
    """Write encoder and decoder as ComfyUI's VAELoader takes them."""
    encoder = rounded(Encoder(encoder_weight()).state_dict(), torch.float16)
    tensors = {f"taesd_encoder.{key}": value for key, value in encoder.items()}
    tensors |= {f"taesd_decoder.{key}": value for key, value in decoder.items()}
    scaling = {"vae_scale": torch.tensor(VAE_SCALE), "vae_shift": torch.tensor(VAE_SHIFT)}
    write(path, tensors | scaling)


def write_png(path: Path, picture: Tensor) -> None:
    """Write (3, height, width) of 0…1."""
    _, height, width = picture.shape
    rows = (picture * 255).round().byte().cpu().movedim(0, -1).reshape(height, -1)
    rows = F.pad(rows, (1, 0))  # each begins with its filter: none

    def chunk(name: bytes, data: bytes) -> bytes:
        checksum = struct.pack(">I", zlib.crc32(name + data))
        return struct.pack(">I", len(data)) + name + data + checksum

    header = struct.pack(">IIBBBBB", width, height, 8, 2, 0, 0, 0)
    pixels = zlib.compress(rows.numpy().tobytes(), 9)
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_bytes(
        b"\x89PNG\r\n\x1a\n" + chunk(b"IHDR", header) + chunk(b"IDAT", pixels) + chunk(b"IEND", b"")
    )


def sheet(pictures: Tensor, columns: int = 8) -> Tensor:
    """(B, 3, h, w) → (3, rows · h, columns · w), with a grey line around each."""
    framed = F.pad(pictures, (1, 1, 1, 1), value=0.5).unflatten(0, (-1, columns))
    return framed.permute(2, 0, 3, 1, 4).flatten(3).flatten(1, 2)


def main() -> None:
    """Train, write and check everything."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--device", type=torch.device, default=torch.device("cpu"))
    parser.add_argument("--out", type=Path, default=MODELS, help="default: %(default)s")
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--minutes", type=float, help="take fewer steps if these would not do")
    parser.add_argument("--steps", type=int, default=20000, help="of the transformer")
    parser.add_argument("--batch", type=int, default=512)
    parser.add_argument("--rate", type=float, default=1e-3)
    parser.add_argument("--ema", type=float, default=0.999)
    parser.add_argument("--layers", type=int, default=Size.layers)
    parser.add_argument("--decoder-steps", type=int, default=3000)
    parser.add_argument("--decoder-batch", type=int, default=64)
    parser.add_argument("--pool", type=int, default=2**18, help="pictures to train on")
    parser.add_argument("--evaluate", type=int, default=512, help="prompts to check")
    parser.add_argument("--compile", action="store_true", help="faster; needs a C compiler")
    options = parser.parse_args()

    start = time.monotonic()
    torch.set_float32_matmul_precision("high")
    torch.manual_seed(options.seed)
    generator = torch.Generator(options.device).manual_seed(options.seed)
    scenes = all_scenes()
    random.Random(options.seed).shuffle(scenes)
    held_out = scenes[: int(HELD_OUT * len(scenes))]
    scenes = scenes[len(held_out) :]
    encoder = encoder_weight().to(options.device)

    size = Size(layers=options.layers)
    orthogonal, _ = torch.linalg.qr(torch.randn(size.caption_dim, size.caption_dim))
    table = orthogonal[: len(VOCABULARY)].contiguous()
    write(options.out / WORDS_FILE, {"words": table}, vocabulary=json.dumps(VOCABULARY))
    table = table.to(options.device)

    decoder = train_decoder(scenes, encoder, options, generator)
    decoder_weights = rounded(decoder.state_dict(), torch.float16)
    write_vae(options.out / VAE_FILE, decoder_weights)
    pool = draw_pool(scenes, options.pool, encoder, options.seed, generator)
    print(f"{len(pool.latents)} pictures, latent std {pool.latents.float().std():.2f}", flush=True)

    net = ZImage(size).to(options.device)
    minutes = options.minutes and options.minutes - (time.monotonic() - start) / 60
    weights = train_transformer(net, pool, table, options, generator, minutes)
    weights = rounded(weights, torch.bfloat16)
    write(options.out / MODEL_FILE, weights)

    net.load_state_dict(weights)  # check what is in the files
    decoder.load_state_dict(decoder_weights)
    held_out = held_out[: options.evaluate]
    for steps, cfg in ((8, 1.0), (12, 1.0), (20, 1.0), (8, 2.0), (12, 2.0), (20, 2.0)):
        pictures = evaluate(
            net, decoder, table, held_out, generator.manual_seed(options.seed), steps=steps, cfg=cfg
        )
        shown = sheet(pictures[: len(pictures) // 8 * 8][:64])
        write_png(options.out / f"samples_{steps}_steps_cfg_{cfg:g}.png", shown)
    print(f"done in {time.monotonic() - start:.0f} s")


if __name__ == "__main__":
    main()
