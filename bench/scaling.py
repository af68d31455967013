"""The tables of `docs/scaling.md`: predictions, and how far they are from the measured rows.

    python -m bench.scaling

writes them into the page, each between the lines that mark its place; and one into `README.md`.
"""

import argparse
import json
import re
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, fields, replace
from pathlib import Path

from bench.extents import Extent
from tp_runtime.config import Layout, Precision, fitting_weights
from tp_runtime.layouts.cost_model import (
    BYTES,
    DEVICES,
    HOST_RATES,
    LINKS,
    Device,
    Link,
    Prediction,
    coded_sum_s,
    device_of,
    layouts,
    nccl_s,
    predict,
    predict_blocks,
    usual_link,
)
from tp_runtime.layouts.room import bytes_beside, streamed_bytes
from tp_runtime.layouts.step_history import Workload
from tp_runtime.models import families, family_named
from tp_runtime.sharding.block_costs import BlockCosts

PAGE = Path(__file__).parents[1] / "docs" / "scaling.md"
README = Path(__file__).parents[1] / "README.md"
RESULTS = Path(__file__).parent / "results"
GPUS_PER_HOST = 8
NVLINK = LINKS["nvlink"]
# Part of a step → GPUs → ms.
PROFILE = {
    "matmul": {1: 64.0, 2: 31.9},
    "attention": {1: 17.2, 2: 8.3},
    "elementwise": {1: 6.9, 2: 5.1},
    "links": {1: 0.0, 2: 10.2},
}
# Commits from before the sum, the residual and the norm were one kernel.
THROUGH_NCCL = {"868a490"}


@dataclass(frozen=True)
class Case:
    """What a step is predicted for, with the inputs of the benchmark."""

    model: str
    extent: Extent
    batch: int
    layout: Layout
    link: Link = NVLINK
    device: Device = DEVICES["H200"]
    precision: Precision = "exact"
    references: int = 0
    gpu_gib: float | None = None  # of weights that each GPU may hold

    @property
    def sums(self) -> str:
        """What the GPUs add up by, and in how many bits if those are 8."""
        if self.link.fused:
            return "fused"
        return f"NCCL, {self.link.name}{', 8 bits' * (self.precision == 'fast')}"

    def predict(self) -> Prediction:
        one = 1, *self.workload.latent_shape[1:]
        return predict(
            family_named(self.model).published,
            self.workload,
            self.layout,
            self.device,
            self.link,
            references=[one] * self.references,
            precision=self.precision,
            streamed=self.streamed,
        )

    @property
    def workload(self) -> Workload:
        of_model = family_named(self.model)
        shape = self.batch, *self.extent.latent_shape(of_model)
        return Workload(shape, of_model.text_tokens)

    @property
    def streamed(self) -> int:
        """Bytes of weights that each GPU reads from the host's memory."""
        of_model = family_named(self.model)
        sizes = of_model.published
        limit = None if self.gpu_gib is None else int(self.gpu_gib * 2**30)
        weights = BYTES * sizes.table.num_elements
        return streamed_bytes(of_model.label, sizes, self.layout.tp_size, weights, limit)

    @property
    def bytes_beside(self) -> float:
        """The room that the weights leave."""
        return bytes_beside(family_named(self.model).published, self.workload, self.layout)

    @property
    def label(self) -> str:
        return family_named(self.model).label

    @property
    def what(self) -> str:
        """The size, and what else is special about it."""
        found = str(self.extent)
        if self.references:
            found += f", {self.references} reference{'s' * (self.references > 1)}"
        return found if self.gpu_gib is None else f"{found}, {self.gpu_gib:g} GiB a GPU"


# What was measured on 4 H100s (28 November 2026). Without peer access: NCCL_P2P_DISABLE=1.
H100 = DEVICES["H100"]
# Exchanges were NCCL's there, in one turn.
WITHOUT_PEERS = replace(LINKS["pcie5-host"], turns=1)
SUMS_WITHOUT_PEERS = {2: 1.16, 4: 2.00}  # NCCL's, of 28 MiB, in ms
# The same in 8 bits and two steps: a trial, with other kernels than `precision=fast` has.
CODED_SUMS_WITHOUT_PEERS = {2: 0.76, 4: 0.94}
STEPS_OF_H100S = {  # ms, at 1024²
    Case(model, Extent(1024, 1024), 1, Layout(size), link, H100): ms
    for model, link, of_sizes in (
        ("flux", NVLINK, {1: 124.8, 2: 70.4, 4: 42.9}),
        ("z_image", NVLINK, {1: 91.5, 2: 50.7, 4: 35.2}),
        ("qwen_image", NVLINK, {1: 120.5, 2: 69.6, 4: 47.8}),
        ("flux", WITHOUT_PEERS, {2: 144.0, 4: 173.0}),
    )
    for size, ms in of_sizes.items()
}
VIDEO_BLOCKS = [  # tokens, link, layout, and s of 40 blocks
    (tokens, link, layout, seconds)
    for tokens, link, of_layouts in (
        (75_600, NVLINK, (2.80, 2.69, 2.81)),
        (75_600, WITHOUT_PEERS, (6.08, 3.25, 4.46)),
        (32_760, NVLINK, (0.70, 0.64, 0.67)),
        (32_760, WITHOUT_PEERS, (2.25, 0.92, 1.46)),
    )
    for layout, seconds in zip(
        (Layout(4), Layout(1, 1, 4), Layout(2, 1, 2)), of_layouts, strict=True
    )
]


def video_blocks(tokens: int) -> BlockCosts:
    """Self-attention and MLP of Wan's sizes, without the caption, 40 times."""
    (block,) = family_named("wan").published.table.block_costs(0, tokens)
    columns, rows = ((5120, 3 * 5120), (5120, 13824)), ((5120, 5120), (13824, 5120))
    linears = tuple(
        next(each for each in block.linears if (each.axis, each.full) == (axis, full))
        for axis, sizes in ((0, columns), (1, rows))
        for full in sizes
    )
    assert block.count == 40
    return replace(block, linears=linears, attentions=block.attentions[:1])


@dataclass(frozen=True)
class Measured:
    """A row of `bench/results`, and what is predicted for it."""

    case: Case
    commit: str
    ms: float

    @property
    def error(self) -> float:
        return self.case.predict().ms / self.ms - 1


def measured() -> list[Measured]:
    """Every row of the runtime on GPUs, optimised; of equal cases the newest: code gets faster.

    Sums through NCCL and fused ones are different cases.
    """
    newest: dict[Case, Measured] = {}
    for path in sorted(RESULTS.glob("*.json")):  # by date
        for row in json.loads(path.read_text()):
            if row.get("where") == "comfyui":
                continue  # a sampler's step, not an evaluation
            if not row["tp"] or row["device"] == "cpu" or row["optimize"] == "off":
                continue  # diffusers alone; no GPU; operations as written
            if row.get("weights", "bf16") != "bf16":
                continue  # products with quantised weights are not predicted
            device = device_of(row["device"])
            assert device is not None, f"{path}: no rates are known of {row['device']}"
            link = replace(NVLINK, fused=row["commit"] not in THROUGH_NCCL or row["tp"] == 1)
            if row.get("peer_access") is False:
                link = usual_link(device, peers=False)
            case = Case(
                row["model"],
                Extent.parse(str(row["side"])),
                row["batch"],
                Layout(row["tp"], row.get("batch_groups", 1), row.get("sequence_size") or 1),
                link,
                device,
                row.get("precision", "exact"),
                row.get("references", 0),
                row.get("gpu_memory_gib"),
            )
            newest[case] = Measured(case, row["commit"], row["ms_median"])
    return list(newest.values())


def check() -> str:
    rows = [
        [
            each.case.label,
            each.case.device.name,
            each.case.layout,
            each.case.what,
            each.case.batch,
            each.case.sums,
            each.commit,
            f"{each.ms:.1f}",
            f"{each.case.predict().ms:.1f}",
            f"{each.error:+.1%}",
        ]
        for each in measured()
    ]
    heads = ["model", "GPU", "layout", "size", "batch", "sums", "commit"]
    return _table([*heads, "measured, ms", "predicted, ms", "error"], rows)


def one_host() -> str:
    """One latent on one host."""
    sizes = (1, 2, 3, 4, 5, 6, 8)
    rows = []
    for model, extent in _models_and_extents():
        times = {size: Case(model, extent, 1, Layout(size)).predict().ms for size in sizes}
        cells = [f"{ms:.1f}" for ms in times.values()]
        speed_up = f"{times[1] / times[8]:.1f}"
        rows.append([_label(model), extent, *cells, speed_up, _fastest(8, model, extent, 1)])
    return _table(["model", "size", *sizes, "speed-up on 8", "fastest on 8"], rows)


def cfg() -> str:
    """Two latents on one host."""
    shown = [
        Layout(*sizes) for sizes in ((1, 1), (2, 1), (1, 2), (4, 1), (2, 2), (8, 1), (4, 2), (2, 4))
    ]
    rows = []
    for model, extent in _models_and_extents():
        found = {at: Case(model, extent, 2, at).predict().ms for at in shown}
        best = {
            num: min((ms, at) for at, ms in found.items() if at.num_gpus == num)[1]
            for num in (2, 4, 8)
        }
        cells = [
            f"**{ms:.1f}**" if at in best.values() else f"{ms:.1f}" for at, ms in found.items()
        ]
        rows.append([_label(model), extent, *cells, _fastest(8, model, extent, 2)])
    return _table(["model", "size", *shown, "fastest on 8"], rows)


def limits() -> str:
    """Where the time of a step goes as a tensor-parallel group grows, FLUX.1."""
    parts = [part.name for part in fields(Prediction) if part.name != "streaming"]
    rows = []
    for extent in Extent.usual(family_named("flux")):
        alone = Case("flux", extent, 1, Layout(1)).predict().ms
        for size in (1, 2, 4, 8, 12, 24):
            link = LINKS["nvlink" if size <= GPUS_PER_HOST else "network"]
            found = Case("flux", extent, 1, Layout(size), link).predict()
            times = [*(getattr(found, part) for part in parts), found.ms]
            name = "" if size == 1 else link.name
            efficiency = f"{alone / found.ms / size:.0%}"
            rows.append([extent, size, name, *(f"{ms:.1f}" for ms in times), efficiency])
    return _table(["size", "GPUs", "link", *parts, "ms", "of even"], rows)


def links() -> str:
    """One latent, FLUX.1, over each link."""
    cases = [(at, size) for at in Extent.usual(family_named("flux")) for size in (2, 4, 8)]
    rows = []
    for name, link in LINKS.items():
        if name != "network":  # for groups beyond one host
            times = [Case("flux", at, 1, Layout(size), link).predict().ms for at, size in cases]
            rows.append([name, *(f"{ms:.0f}" for ms in times)])
    return _table(["link", *(f"{at}, {size}" for at, size in cases)], rows)


def many_gpus() -> str:
    """The fastest layout in hosts of eight with a 400 Gb/s port for each GPU."""
    batches = (1, 2, 8, 64)
    rows = []
    for model, extent in _models_and_extents():
        for num_gpus in (8, 16, 64):
            cells = [_fastest(num_gpus, model, extent, batch) for batch in batches]
            rows.append([_label(model), extent, num_gpus, *cells])
    return _table(["model", "size", "GPUs", *(f"batch {batch}" for batch in batches)], rows)


def throughput() -> str:
    """Eight latents on eight GPUs."""
    shown = [Layout(8), Layout(4, 2), Layout(2, 4), Layout(1, 8)]
    rows = []
    for model in families():
        extent = Extent.usual(family_named(model))[0]
        times = [Case(model, extent, 8, at).predict().ms for at in shown]
        rows.append([_label(model), *(f"{ms:.0f} ms, {8e3 / ms:.0f}/s" for ms in times)])
    return _table(["model", *shown], rows)


def constants() -> str:
    """The rates of devices and links."""
    rows: list[list[object]] = []
    for device in DEVICES.values():
        rates = f"{device.matmul / 1e12:.0f} and {device.attention / 1e12:.0f} TFLOP/s"
        value = f"{rates}, {device.memory / 1e12:.1f} TB/s"
        rows.append([f"GPU `{device.name}`", value, device.source])
    for link in LINKS.values():
        rates = f"{link.rate / 1e9:g} and {link.exchange_rate / 1e9:g} GB/s"
        if link.exchange_total is not None:
            rates += f", all together {link.exchange_total / 1e9:g} in exchanges"
        value = f"{rates}, {1e6 * link.hop_s:.1f} µs a hop"
        sums = "fused sums" if link.fused else "NCCL's sums"
        rows.append([f"link `{link.name}`", f"{value}, {sums}", link.source])
    for generation, rate in HOST_RATES.items():
        source = "measured on an H200" if generation == 5 else "usual for such slots; not measured"
        rows.append([f"host's memory, PCIe {generation}.0 x16", f"{rate / 1e9:g} GB/s", source])
    return _table(["what", "value", "source"], rows)


def sharing() -> str:
    """What was measured on 4 H100s, with and without peer access."""
    rows: list[list[object]] = []

    def add(what: str, link: str, layout: Layout, found: float, of: float, unit: str) -> None:
        digits = 2 if unit == "s" else 1
        times = (f"{number:.{digits}f} {unit}" for number in (of, found))
        rows.append([what, link, layout, *times, f"{found / of - 1:+.1%}"])

    for size, ms in SUMS_WITHOUT_PEERS.items():
        found = 1e3 * nccl_s(28 * 2**20, size, WITHOUT_PEERS)
        times = f"{ms:.2f} ms", f"{found:.2f} ms", f"{found / ms - 1:+.1%}"
        rows.append(["a sum of 28 MiB", WITHOUT_PEERS.name, Layout(size), *times])
    for size, ms in CODED_SUMS_WITHOUT_PEERS.items():
        found = 1e3 * coded_sum_s(28 * 2**20, size, H100, WITHOUT_PEERS)
        times = f"{ms:.2f} ms", f"{found:.2f} ms", f"{found / ms - 1:+.1%}"
        what = "a sum of 28 MiB in 8 bits (a trial)"
        rows.append([what, WITHOUT_PEERS.name, Layout(size), *times])
    for case, ms in STEPS_OF_H100S.items():
        what = f"{case.label}, {case.extent}"
        add(what, case.link.name, case.layout, case.predict().ms, ms, "ms")
    for tokens, link, layout, seconds in VIDEO_BLOCKS:
        sizes = layout.tp_size, layout.sequence_size
        found = predict_blocks(video_blocks(tokens), 1, *sizes, H100, link)
        add(
            f"40 blocks of {_label('wan')}, {tokens:,} tokens",
            link.name,
            layout,
            found.ms / 1e3,
            seconds,
            "s",
        )
    return _table(["what", "link", "layout", "measured", "predicted", "error"], rows)


def cards() -> str:
    """Cards without NVLink, one latent."""
    shown = [Layout(1), Layout(2), Layout(1, 1, 2), Layout(4), Layout(2, 1, 2), Layout(1, 1, 4)]
    machines = [
        *((card, link) for card in ("RTX 3090", "RTX 4090") for link in ("pcie-host",)),
        *(("RTX 5090", link) for link in ("pcie-host", "pcie5-host")),
        *(("RTX PRO 6000", link) for link in ("pcie-host", "pcie", "pcie5-host", "pcie5")),
    ]
    rows = []
    for model in ("z_image", "flux", "wan"):
        extent = Extent.usual(family_named(model))[0]
        for card, link in machines:
            case = Case(model, extent, 1, Layout(1), LINKS[link], DEVICES[card])
            times = {at: replace(case, layout=at).predict().ms for at in shown}
            best = [
                min((at for at in shown if at.num_gpus == num), key=lambda at: times[at])
                for num in (2, 4)
            ]
            cells = [f"**{ms:.0f}**" if at in best else f"{ms:.0f}" for at, ms in times.items()]
            rows.append([_label(model), extent, card, link, *cells])
    return _table(["model", "size", "card", "link", *shown], rows)


def cards_in_short() -> str:
    """What people ask first: a picture on one, two and four cards, in the best layout."""
    counts = {1: [Layout(1)], 2: [Layout(2), Layout(1, 1, 2)]}
    counts[4] = [Layout(4), Layout(2, 1, 2), Layout(1, 1, 4)]
    model, rows = "flux", []
    extent = Extent.usual(family_named(model))[0]
    for card, link, slot in (
        ("RTX 3090", "pcie-host", "PCIe 4"),
        ("RTX 4090", "pcie-host", "PCIe 4"),
        ("RTX 5090", "pcie5-host", "PCIe 5"),
        ("RTX PRO 6000", "pcie5-host", "PCIe 5"),
    ):
        case = Case(model, extent, 1, Layout(1), LINKS[link], DEVICES[card])
        times = [
            min(replace(case, layout=layout).predict().ms for layout in layouts)
            for layouts in counts.values()
        ]
        cells = [f"{ms:.0f} ({times[0] / ms:.1f} ×)" for ms in times[1:]]
        rows.append([f"{card}, {slot}", f"{times[0]:.0f}", *cells])
    return _table([f"{_label(model)} {extent}, predicted ms", "1", "2", "4"], rows)


def streaming() -> str:
    """Two cards without NVLink that cannot hold all of the weights, one latent."""
    shown = [Layout(1), Layout(2), Layout(1, 1, 2)]
    rows = []
    for model in ("flux", "wan", "qwen_image"):
        extent = Extent.usual(family_named(model))[0]
        case = Case(model, extent, 1, Layout(1), LINKS["pcie-host"], DEVICES["RTX 4090"])
        for gib in (8, 12, 16, 24, None):
            cells = []
            for layout in shown:
                here = replace(case, layout=layout)
                if gib is not None:
                    held = fitting_weights(gib * 2**30, here.bytes_beside)
                    here = replace(here, gpu_gib=held / 2**30)
                read = here.streamed / 2**30
                cells.append(f"{here.predict().ms:.0f}" + f" ({read:.1f} GiB)" * bool(read))
            rows.append([_label(model), extent, "all" if gib is None else f"{gib} GiB", *cells])
    return _table(["model", "size", "memory", *shown], rows)


def eight_bits() -> str:
    """What 8 bits between the GPUs make of one latent, where no NVLink connects them."""
    shown = [Layout(2), Layout(1, 1, 2), Layout(4), Layout(2, 1, 2), Layout(1, 1, 4)]
    machines = [
        ("H100", "pcie5-host"),
        ("RTX 4090", "pcie-host"),
        ("RTX 5090", "pcie5-host"),
        ("RTX PRO 6000", "pcie5"),
    ]
    rows = []
    for model in ("z_image", "flux", "wan"):
        extent = Extent.usual(family_named(model))[0]
        for card, link in machines:
            case = Case(model, extent, 1, Layout(1), LINKS[link], DEVICES[card])
            cells = []
            for layout in shown:
                exact = replace(case, layout=layout).predict().ms
                fast = replace(case, layout=layout, precision="fast").predict().ms
                cells.append(f"{exact:.0f} → {fast:.0f}")
            rows.append([_label(model), extent, card, link, *cells])
    return _table(["model", "size", "card", "link", *shown], rows)


def profile() -> str:
    """The parts of a step, against the profile in `bench/RESULTS.md` (Z-Image, commit 868a490)."""
    rows: list[list[object]] = []
    for part, times in PROFILE.items():
        cells = []
        for size, ms in times.items():
            link = replace(NVLINK, fused=False)
            square = Extent(1024, 1024)
            found = getattr(Case("z_image", square, 1, Layout(size), link).predict(), part)
            cells += [f"{ms:.1f}", f"{found:.1f}"]
        rows.append([part, *cells])
    heads = ["part", "1 GPU: measured", "predicted", "2 GPUs: measured", "predicted"]
    return _table(heads, rows)


TABLES: dict[Path, dict[str, Callable[[], str]]] = {README: {"cards in short": cards_in_short}}
TABLES[PAGE] = {
    "constants": constants,
    "check": check,
    "sharing": sharing,
    "profile": profile,
    "one host": one_host,
    "cfg": cfg,
    "limits": limits,
    "links": links,
    "cards": cards,
    "streaming": streaming,
    "eight bits": eight_bits,
    "many GPUs": many_gpus,
    "throughput": throughput,
}


def page(path: Path) -> str:
    """The page with its tables replaced."""
    text = path.read_text()
    for name, table in TABLES[path].items():
        begin, end = f"<!-- {name} -->", f"<!-- end of {name} -->"
        pattern = f"{re.escape(begin)}.*{re.escape(end)}"
        text, found = re.subn(pattern, f"{begin}\n{table()}\n{end}", text, flags=re.DOTALL)
        assert found == 1, f"{path} has {found} places for the table {name!r}"
    return text


def _fastest(num_gpus: int, model: str, extent: Extent, batch: int) -> str:
    """The fastest way to use up to that many GPUs, and its ms."""
    found = {case.layout: case.predict().ms for case in _on(num_gpus, model, extent, batch)}
    best = min(found, key=lambda layout: found[layout])
    return f"{best}: {found[best]:.0f}"


def _on(num_gpus: int, model: str, extent: Extent, batch: int) -> Iterator[Case]:
    """Every way to use up to that many GPUs; a batch group that fits a host stays in one.

    Tokens are shared inside a host only.
    """
    of_model = family_named(model)
    for size in range(1, num_gpus + 1):
        in_host = size <= GPUS_PER_HOST
        if in_host:
            groups, link = num_gpus // GPUS_PER_HOST * (GPUS_PER_HOST // size), NVLINK
        else:
            groups, link = num_gpus // size, LINKS["network"]
        shares = in_host and of_model.shares_tokens
        for layout in layouts(of_model.published, size, shares_tokens=shares):
            if layout.batch_groups == 1:
                layout = replace(layout, batch_groups=min(groups, batch))
                yield Case(model, extent, batch, layout, link)


def _models_and_extents() -> Iterator[tuple[str, Extent]]:
    return ((name, extent) for name, of in families().items() for extent in Extent.usual(of))


def _label(model: str) -> str:
    return family_named(model).label


def _table(heads: Sequence[object], rows: list[list[object]]) -> str:
    lines = [heads, ["---"] * len(heads), *rows]
    return "\n".join(f"| {' | '.join(map(str, line))} |" for line in lines)


if __name__ == "__main__":
    argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawTextHelpFormatter
    ).parse_args()
    for path in TABLES:
        path.write_text(page(path))
