"""A comparison's report as files: pictures, Markdown, HTML, JSON."""

from __future__ import annotations

import base64
import json
import os
import re
import statistics
from collections.abc import Mapping, Sequence
from functools import partial
from pathlib import Path
from typing import NamedTuple
from urllib.parse import quote

from adarank_fast.comparison.findings import bounded, detail_tables, remarks, tables, verdicts
from adarank_fast.comparison.folder import COMPARISON, claim
from adarank_fast.comparison.numbers import IntervalNumbers, Results
from adarank_fast.files import own_folder, write_text, writing
from adarank_fast.plan.rank_plan import RankPlan
from adarank_fast.plots.plans import plot_disagreement, plot_ranks
from adarank_fast.plots.runs import plot_intervals, plot_training
from adarank_fast.plots.style import DPI

RANKS = "Ranks"


class Picture(NamedTuple):
    """A file of the report's folder and the section that shows it."""

    section: str
    caption: str
    name: str


class Section(NamedTuple):
    """A heading, its tables as (header, rows), and its pictures."""

    title: str
    tables: list[tuple[Sequence[str], Sequence[Sequence[str]]]]
    pictures: list[Picture]


def save_report(
    folder: str | os.PathLike[str], results: Results, plans: Mapping[str, RankPlan]
) -> None:
    """Write the report into `folder`; each file appears whole or not at all.

    Raises:
        AdarankError: the folder is of something else, or holds the runs of another comparison.
    """
    settings = {key: value for key, value in results["settings"].items() if key != "seeds"}
    with own_folder(folder, COMPARISON) as mine, writing(folder):
        claim(mine, settings)
        (mine / "plans").mkdir(exist_ok=True)
        for arm, plan in plans.items():
            plan.save(mine / "plans" / f"{arm}.json")
        pictures = draw(results, plans, mine)
        for name, text in (
            ("results.json", json.dumps(results, indent=1, allow_nan=False) + "\n"),
            ("report.md", _render("report.md.jinja", results, pictures, mine)),
            ("report.html", _render("report.html.jinja", results, pictures, mine)),
        ):
            write_text(mine / name, text)


def draw(results: Results, plans: Mapping[str, RankPlan], folder: Path) -> list[Picture]:
    """The pictures, written into `folder`."""
    settings, baseline = results["settings"], results["baseline"]
    metric, points = settings["metric"], settings["metric"] == "accuracy"
    scale = 100 if points else 1
    values, changes = {}, {}
    for arm, numbers in results["arms"].items():
        if numbers["value"]:
            values[arm] = _scaled(results, numbers["by_seed"], numbers["value"])
        if difference := results["differences"].get(arm):
            changes[arm] = _scaled(results, difference["by_seed"], difference["seeds"], True)
    quality, order = tables(results)[0][0], list(results["arms"])
    made: list[Picture] = []

    def add(section: str, caption: str, name: str) -> Path:
        made.append(Picture(section, caption, name))
        return folder / name

    percent = ", %" if points else ""
    each = "Dots: seeds; diamond and line: their mean and its 95% interval"
    if values:
        path = add(quality, f"Held-out {metric}. {each}.", "metric.png")
        plot_intervals(values, path, f"held-out {metric}{percent}", order=order)
    if changes:
        better = "above" if settings["greater_is_better"] else "below"
        unit = f"{metric} minus {baseline}'s"
        unit += f"{', in points' if points else ''} ({better} 0 is better)"
        caption = f"Minus {baseline}, paired by seed. {each}."
        plot_intervals(changes, add(quality, caption, "differences.png"), unit, True, order)
    for arm, plan in plans.items():
        if len(set(plan.ranks.values())) > 1:
            plot_ranks(plan, add(RANKS, f"Ranks of {arm}", f"ranks-{arm}.png"))
        if plan.scores:
            caption = f"{arm}: how far the model's output moves when a module is perturbed"
            plot_disagreement(plan, add(RANKS, caption, f"disagreement-{arm}.png"))
    if curves := _curves(results):
        path = add("Training", "Training loss, mean of the seeds", "training.png")
        plot_training(curves, path, "training loss", order=order)
    rates: dict[str, list[tuple[float, float]]] = {}
    for cell in results["sweep"]:
        if cell["value"] is not None:
            point = (cell["learning_rate"], scale * cell["value"])
            rates.setdefault(cell["arm"], []).append(point)
    if rates:
        ticks = sorted({rate for points in rates.values() for rate, _ in points})
        path = add("Learning rates", "The sweep: validation after one epoch", "rates.png")
        plot_training(rates, path, f"validation {metric}{percent}", "learning rate", ticks, order)
    return made


def sections(results: Results, pictures: Sequence[Picture]) -> list[Section]:
    """The report's sections, in reading order; claims come before them, the method after them."""
    main = tables(results)
    found = {title: (header, rows) for title, header, rows in main + detail_tables(results)}
    titles = [title for title, _, _ in main]
    made = [
        Section(
            title,
            [found[title]] if title in found else [],
            [picture for picture in pictures if picture.section == title],
        )
        for title in dict.fromkeys([*titles, RANKS, "Training", "Learning rates", *found])
    ]
    return [section for section in made if section.tables or section.pictures]


def _scaled(
    results: Results,
    by_seed: Mapping[str, float | None] | Mapping[str, float],
    found: IntervalNumbers,
    difference: bool = False,
) -> tuple[list[float], float | None, float | None]:
    """(of each seed, low, high), in percent where it is an accuracy."""
    scale = 100 if results["settings"]["metric"] == "accuracy" else 1
    ends = (bounded(results, found[end], difference) for end in ("low", "high"))
    low, high = (None if end is None else scale * end for end in ends)
    return [scale * value for value in by_seed.values() if value is not None], low, high


def _curves(results: Results) -> dict[str, list[tuple[float, float]]]:
    """Each arm's training loss, the mean over its seeds that did not diverge."""
    found = {}
    for arm in results["arms"]:
        mine = [r["curve"] for r in results["runs"] if r["arm"] == arm and not r["diverged"]]
        if mine:
            found[arm] = [
                (points[0][0], statistics.fmean(value for _, value in points if value is not None))
                for points in zip(*mine, strict=True)
            ]
    return found


def notes(results: Results) -> list[str]:
    """What was done, and on what."""
    settings, machine = results["settings"], results["machine"]
    classes = f", {settings['classes']} classes" if settings["classes"] else ""
    length = f"{settings['epochs']} epochs"
    if settings["max_steps"]:
        length += f" or {settings['max_steps']} steps"
    rates = settings["learning_rates"]
    chosen = "learning rate as given"
    if len(rates) > 1:
        chosen = (
            f"learning rate for each arm from {', '.join(f'{rate:g}' for rate in rates)}: the best "
            f"after one epoch on a tenth of the training data, seed {settings['sweep_seed']}"
        )
    divided = ""
    if settings.get("expert_rank") == "divided":
        divided = " (of experts: divided by how many are active)"
    scaling = settings["scaling"]
    rule = "lora_alpha = 2 * rank" if scaling == "constant" else f"scaling {scaling}"
    versions = ", ".join(f"{name} {number}" for name, number in settings["versions"].items())
    seconds, cells = results["training_seconds"], results["cell_seconds"]
    return [
        f"{settings['train_items']:,} training items, {settings['held_out_items']:,} held out"
        f"{classes}. All arms: {length}, batch size {settings['batch_size']}, {rule}, seeds "
        f"{', '.join(map(str, settings['seeds']))}, the same order of items and the same "
        f"initial heads; {chosen}.",
        f"The budget is uniform LoRA's of rank {settings['average_rank']}{divided}: "
        f"{settings['budget_parameters']:,} parameters. Started {settings['date']}. The runs took "
        f"{cells:.0f} s, of which {seconds:.0f} s were training steps.",
        f"{machine['system']}, {machine['device']}, threads "
        f"{', '.join(map(str, machine['threads']))}; Python {machine['python']}, {versions}. "
        "Times are medians. On a CPU, peak memory is that of the whole process.",
    ]


def _render(template: str, results: Results, pictures: Sequence[Picture], folder: Path) -> str:
    from jinja2 import Environment, FileSystemLoader, StrictUndefined

    environment = Environment(
        loader=FileSystemLoader(Path(__file__).parent),
        autoescape=".html" in template,
        undefined=StrictUndefined,
        trim_blocks=True,
        lstrip_blocks=True,
        keep_trailing_newline=True,
    )
    environment.filters |= {"plain": _plain, "quote": quote}
    return environment.get_template(template).render(
        title=results["settings"]["title"],
        verdicts=verdicts(results),
        remarks=remarks(results),
        sections=sections(results, pictures),
        notes=notes(results),
        size=partial(_embedded, folder),
    )


def _plain(text: str) -> str:
    """Text that Markdown shows as it is: names may hold anything."""
    return re.sub(r"([\\`*<\[|])", r"\\\1", " ".join(text.split()))


def _embedded(folder: Path, picture: Picture) -> dict[str, object]:
    """A narrow screen shrinks a picture. Heat maps of ranks scroll before they get unreadable."""
    data = (folder / picture.name).read_bytes()
    inches = int.from_bytes(data[16:20], "big") / DPI  # PNG: the first number of its header
    width = round(max(72 * inches, min(100 * inches, 960)))  # pixels; 960 fill the page
    # the more layers, the smaller the figures in the cells
    least = (width if width == 960 else min(width, 480)) if picture.section == RANKS else None
    return {"width": width, "least": least, "data": base64.b64encode(data).decode()}
