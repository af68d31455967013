"""The tables of `docs/scaling.md`: predictions, and how far they are from the measured rows.

    python -m bench.scaling

writes them into the page, each between the lines that mark its place.
"""

import json
import re
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, fields, replace
from pathlib import Path

from bench.extents import Extent
from tp_runtime.config import Layout
from tp_runtime.layouts.cost_model import DEVICES, LINKS, Link, Prediction, device_of, predict
from tp_runtime.models import families, family_named

PAGE = Path(__file__).parents[1] / "docs" / "scaling.md"
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
    device: str = "NVIDIA H200"

    def predict(self) -> Prediction:
        of_model = family_named(self.model)
        latent = self.extent.latent_shape(of_model)
        return predict(
            of_model.published,
            (self.batch, *latent),
            of_model.text_tokens,
            self.layout.tp_size,
            self.layout.batch_groups,
            device_of(self.device),
            self.link,
        )

    @property
    def label(self) -> str:
        return family_named(self.model).label


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
            if row.get("weights", "bf16") != "bf16" or (row.get("sequence_size") or 1) > 1:
                continue  # products with quantised weights, and sharing tokens, are not predicted
            if row.get("streamed_gib"):
                continue  # nor is reading weights from the host's memory
            link = replace(NVLINK, fused=row["commit"] not in THROUGH_NCCL or row["tp"] == 1)
            case = Case(
                row["model"],
                Extent.parse(str(row["side"])),
                row["batch"],
                Layout(row["tp"], row.get("batch_groups", 1)),
                link,
                row["device"],
            )
            newest[case] = Measured(case, row["commit"], row["ms_median"])
    return list(newest.values())


def check() -> str:
    rows = [
        [
            each.case.label,
            each.case.device.removeprefix("NVIDIA "),
            each.case.layout,
            each.case.extent,
            each.case.batch,
            "fused" if each.case.link.fused else "NCCL",
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
        rows.append([_label(model), extent, *cells, f"{times[1] / times[8]:.1f}"])
    return _table(["model", "size", *sizes, "speed-up on 8"], rows)


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
        rows.append([_label(model), extent, *cells])
    return _table(["model", "size", *shown], rows)


def limits() -> str:
    """Where the time of a step goes as a tensor-parallel group grows, FLUX.1."""
    rows = []
    for extent in Extent.usual(family_named("flux")):
        alone = Case("flux", extent, 1, Layout(1)).predict().ms
        for size in (1, 2, 4, 8, 12, 24):
            link = LINKS["nvlink" if size <= GPUS_PER_HOST else "network"]
            found = Case("flux", extent, 1, Layout(size), link).predict()
            times = [*(getattr(found, part.name) for part in fields(found)), found.ms]
            name = "" if size == 1 else link.name
            efficiency = f"{alone / found.ms / size:.0%}"
            rows.append([extent, size, name, *(f"{ms:.1f}" for ms in times), efficiency])
    parts = [part.name for part in fields(Prediction)]
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
            cells = []
            for batch in batches:
                found = [(case.predict().ms, case) for case in _on(num_gpus, model, extent, batch)]
                ms, best = min(found, key=lambda each: each[0])
                cells.append(f"{best.layout}: {ms:.0f}")
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
        value = f"{link.rate / 1e9:.0f} GB/s, {1e6 * link.hop_s:.1f} µs a hop"
        sums = "fused sums" if link.fused else "NCCL's sums"
        rows.append([f"link `{link.name}`", f"{value}, {sums}", link.source])
    return _table(["what", "value", "source"], rows)


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


TABLES = {
    "constants": constants,
    "check": check,
    "profile": profile,
    "one host": one_host,
    "cfg": cfg,
    "limits": limits,
    "links": links,
    "many GPUs": many_gpus,
    "throughput": throughput,
}


def page(text: str) -> str:
    """The page with its tables replaced."""
    for name, table in TABLES.items():
        begin, end = f"<!-- {name} -->", f"<!-- end of {name} -->"
        pattern = f"{re.escape(begin)}.*{re.escape(end)}"
        text, found = re.subn(pattern, f"{begin}\n{table()}\n{end}", text, flags=re.DOTALL)
        assert found == 1, f"{PAGE} has {found} places for the table {name!r}"
    return text


def _on(num_gpus: int, model: str, extent: Extent, batch: int) -> Iterator[Case]:
    """Every way to use up to that many GPUs; groups that fit a host stay in one."""
    for size in family_named(model).published.table.plan.valid_tp_sizes(num_gpus):
        if size <= GPUS_PER_HOST:
            groups, link = num_gpus // GPUS_PER_HOST * (GPUS_PER_HOST // size), NVLINK
        else:
            groups, link = num_gpus // size, LINKS["network"]
        yield Case(model, extent, batch, Layout(size, min(groups, batch)), link)


def _models_and_extents() -> Iterator[tuple[str, Extent]]:
    return ((name, extent) for name, of in families().items() for extent in Extent.usual(of))


def _label(model: str) -> str:
    return family_named(model).label


def _table(heads: Sequence[object], rows: list[list[object]]) -> str:
    lines = [heads, ["---"] * len(heads), *rows]
    return "\n".join(f"| {' | '.join(map(str, line))} |" for line in lines)


if __name__ == "__main__":
    PAGE.write_text(page(PAGE.read_text()))
