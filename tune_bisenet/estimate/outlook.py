"""What a search will take, in words: early stopping, speed, time, money, memory, disk.

The page before a search, and most of `--plan`, is made of these lines. Numbers come from `forecast` and `footprint`;
nothing here reads a file or starts anything; this machine is asked for its memory and disk.
"""

import math
import os
import shutil
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Final

from tune_bisenet import rungs, spaces
from tune_bisenet.config import Resources, Run, format_size
from tune_bisenet.estimate import footprint
from tune_bisenet.estimate.forecast import Kind, Measured, Speed, Timed, Work, makespan, pack_bytes
from tune_bisenet.estimate.timing import Timings
from tune_bisenet.options import duration_words
from tune_bisenet.progress import format_duration
from tune_bisenet.rungs import Forecast
from tune_bisenet.search.prepare import Survey
from tune_bisenet.text import counted

Line = tuple[str, str]
"""Title and text."""

MOST_SIMULATED: Final = 200
"""Trials of a search in which early stopping is simulated: thousands take ten seconds, and save as large a share."""

OTHER_SIZES: Final = (2, 4)
"""How many times as many GPUs the time is also told for."""


@dataclass(frozen=True, kw_only=True)
class Outlook:
    """A search, and what it takes."""

    survey: Survey
    work: Work
    resources: Resources
    speed: Speed | None
    """None where nothing is known of it."""
    timings: Timings | None = None
    """Where trials were timed."""
    speed_problem: str = ""
    """Why they could not be."""

    @property
    def has_gpus(self) -> bool:
        return self.resources.gpus_per_trial > 0

    @property
    def at_once(self) -> int:
        return self.resources.concurrency


def lines(outlook: Outlook) -> list[Line]:
    """From what is stopped early to what lies on disk at the end."""
    stopping = _stopping(outlook)
    return [
        ("scheduler", _scheduler(outlook, stopping)),
        ("speed", _speed(outlook)),
        *_time_and_cost(outlook, stopping),
        ("memory", _memory(outlook)),
        ("disk", _disk(outlook)),
    ]


# --- early stopping -------------------------------------------------------------------------------------------------


def _stopping(outlook: Outlook) -> Forecast | None:
    """What ASHA is expected to do; None for other rules."""
    if outlook.survey.choices.scheduler != "asha":
        return None
    runs = outlook.work.runs[:MOST_SIMULATED]
    return rungs.forecast(runs, spaces.iterations_per_epoch(runs[0], outlook.survey.facts))


def _scheduler(outlook: Outlook, stopping: Forecast | None) -> str:
    if outlook.survey.choices.scheduler == "fifo":
        return "fifo: every run is trained to its end, unless its loss diverges"
    if stopping is None:
        return (
            "median: a run whose best mIoU is below the median of the others' means so far is stopped; it is mild, and "
            "what it saves is not foretold"
        )
    spared = ", ".join(sorted(rungs.spared_rows(outlook.survey.space.rows)))
    return f"asha: {stopping}{f', never {spared}' if spared else ''} (--scheduler fifo trains all to the end)"


# --- time and money -------------------------------------------------------------------------------------------------


def _speed(outlook: Outlook) -> str:
    speed = outlook.speed
    if outlook.timings is not None:
        return _timed(outlook.timings, outlook.resources)
    if isinstance(speed, Timed):
        return (
            f"{outlook.survey.arguments.images_per_second:g} images per second and trial in training, as given; "
            "an image of validation is taken for a third of that, and Lovász-Softmax for no dearer"
        )
    if isinstance(speed, Measured):
        return f"{speed.mean:.1f} s an epoch, as in earlier sessions of this search"
    if outlook.speed_problem:
        return f"not known: {outlook.speed_problem}"
    return "not known: --plan times some iterations, --images-per-second X states it"


def _timed(timings: Timings, resources: Resources) -> str:
    first, *others = timings.speed.timings.items()
    words = [f"{1 / first[1].train:.3g} images per second and trial in training (± {timings.speed.spread:.0%})"]
    words += [f"{1 / timing.train:.3g} {_kind_in_words(kind, first[0])}" for kind, timing in others]
    words += [f"{1 / first[1].val:.3g} in validation"]
    words += [f"{timings.num_untimed} kinds of epochs go by those most alike"] if timings.num_untimed else []
    beside = f", {timings.side_by_side} trials side by side" if timings.side_by_side > 1 else ""
    each = "" if resources.gpus_per_trial else f", {counted(resources.cpus_per_trial, 'thread')} each"
    return f"{', '.join(words)}; timed for {timings.seconds:.0f} s on {timings.device}{beside}{each}"


def _kind_in_words(kind: Kind, first: Kind) -> str:
    """What sets it apart from the first."""
    words = []
    if kind.lovasz != first.lovasz:
        words.append("with Lovász-Softmax" if kind.lovasz else "before Lovász-Softmax")
    if kind.hard_pixels != first.hard_pixels:
        words.append("over hard pixels" if kind.hard_pixels else "over all pixels")
    words += [f"at {format_size(kind.image_size)}"] if kind.image_size != first.image_size else []
    words += [f"with a head {kind.head_width} wide"] if kind.head_width != first.head_width else []
    words += [f"in batches of {kind.batch_size}"] if kind.batch_size != first.batch_size else []
    return " ".join(words)


def _time_and_cost(outlook: Outlook, stopping: Forecast | None) -> list[Line]:
    if outlook.speed is None:
        return []
    seconds = outlook.work.seconds(outlook.speed, outlook.survey.facts)
    if not seconds:
        return [("time", "nothing is left to train")]
    if outlook.work.endless:
        return [("time", _endless(outlook, math.fsum(seconds) / len(seconds)))]
    goes_on = 1.0 - (stopping.epochs_share_saved if stopping else 0.0)
    return [("time", _time(outlook, seconds, goes_on)), ("cost", _cost(outlook, math.fsum(seconds), goes_on))]


def _time(outlook: Outlook, seconds: Sequence[float], goes_on: float) -> str:
    wall = makespan(seconds, at_once=outlook.at_once)
    words = [f"about {_span(wall)} for all to their end, {outlook.at_once} at once, after Ray's start"]
    words += [f"{_span(wall * goes_on)} if asha saves what it may"] if goes_on < 1 else []
    if outlook.has_gpus and len(seconds) > outlook.at_once:
        words += [
            f"{_span(makespan(seconds, at_once=outlook.at_once * times))} with {times} times as many GPUs"
            for times in OTHER_SIZES
            if outlook.at_once * (times // 2) < len(seconds)
        ]
    budget = outlook.survey.limits.time_budget
    if budget is not None and budget < wall:
        words.append(f"--time-budget {duration_words(budget)} ends it before that")
    return "; ".join(words)


def _cost(outlook: Outlook, seconds: float, goes_on: float) -> str:
    hours = _device_hours(outlook, seconds)
    words = [_hours(outlook, hours)]
    words += [f"{_hours(outlook, hours * goes_on)} if asha saves what it may"] if goes_on < 1 else []
    limit = outlook.survey.limits.gpu_hours
    words += [f"--gpu-hours {limit:g} ends it before that"] if limit is not None and limit < hours else []
    if outlook.survey.arguments.price_per_gpu_hour is not None and not outlook.has_gpus:
        words.append("no price: trials here have no GPU (--plan --gpus N is about a cluster that has)")
    return "; ".join(words)


def _endless(outlook: Outlook, seconds: float) -> str:
    """Of a search that only time or money ends."""
    words = [f"about {_span(seconds)} for a trial to its end, {outlook.at_once} at once"]
    limits = outlook.survey.limits
    numbers = []
    if limits.time_budget is not None:
        numbers.append(limits.time_budget / seconds * outlook.at_once)
    if limits.gpu_hours is not None and outlook.has_gpus:
        numbers.append(limits.gpu_hours / _device_hours(outlook, seconds))
    words += [f"the limits have room for some {min(numbers):.0f}"] if numbers else []
    words += [f"{_hours(outlook, _device_hours(outlook, seconds))} each"]
    return "; ".join(words)


def _device_hours(outlook: Outlook, seconds: float) -> float:
    """Of GPUs, or of the machine, which as many trials share as run at once."""
    return seconds / 3600 * (outlook.resources.gpus_per_trial or 1 / outlook.at_once)


def _hours(outlook: Outlook, hours: float) -> str:
    """With what they cost."""
    price = outlook.survey.arguments.price_per_gpu_hour
    unit = "GPU-hours" if outlook.has_gpus else "machine-hours"
    money = f" = {hours * price:,.2f} to pay" if price is not None and outlook.has_gpus else ""
    return f"{hours:.3g} {unit}{money}"


# --- memory and disk ------------------------------------------------------------------------------------------------


def _memory(outlook: Outlook) -> str:
    timings = outlook.timings
    if timings is not None and not outlook.has_gpus:
        each = timings.process_bytes
        need = each * outlook.at_once
        there_is = os.sysconf("SC_PHYS_PAGES") * os.sysconf("SC_PAGE_SIZE")
        scarce = "; NOT ENOUGH: lower --max-concurrent" if need > there_is else ""
        return (
            f"{_bytes(each)} of main memory a trial beside Ray's own, {_bytes(need)} for {outlook.at_once} at once; "
            f"this machine has {_bytes(there_is)}{scarce}"
        )
    tensors, how = _tensor_bytes(outlook)
    if not outlook.has_gpus:
        return f"about {_bytes(tensors)} of main memory a trial for tensors ({how}), and some 0.8 GB for its programs"
    return _on_card(outlook, tensors, how)


def _tensor_bytes(outlook: Outlook) -> tuple[int, str]:
    """Of a trial in training, and how that is known."""
    if outlook.timings is not None and outlook.timings.card_bytes is not None:
        return outlook.timings.card_bytes, "measured"
    return max(_footprint(outlook, run).training for run in _different(outlook)), "estimated"


def _on_card(outlook: Outlook, tensors: int, how: str) -> str:
    """Packed frames are kept there, too, where they are at most a share of what is free: that cannot do harm."""
    frames = max(_pack_bytes(outlook, size) for size in _sizes(outlook))
    need = tensors + footprint.CONTEXT_BYTES
    words = f"about {_bytes(need)} of a card for a trial's tensors ({how}) and CUDA's own"
    frame_words = f"; its {_bytes(frames)} of frames are kept there too, split by split, where they fit well"
    device_bytes = outlook.timings.device_bytes if outlook.timings else None
    if device_bytes is None:
        return words + frame_words
    share = device_bytes * min(outlook.resources.gpus_per_trial, 1.0)
    of = f"; {_bytes(round(share))} of the {outlook.timings.device if outlook.timings else 'card'} are its own"
    scarce = ": NOT ENOUGH, lower --image-size or share the card less" if need > share else ""
    return words + of + scarce + frame_words


def _disk(outlook: Outlook) -> str:
    packs = sum(_pack_bytes(outlook, size) for size in _sizes(outlook))
    cache_dir = outlook.survey.cache_dir
    room = shutil.disk_usage(next(place for place in (cache_dir, *cache_dir.parents) if place.exists()))
    free = f", {_bytes(room.free)} are free here{': NOT ENOUGH' if packs > room.free else ''}"
    prints = [_footprint(outlook, run) for run, _done in outlook.work.left]
    if not prints:
        return f"{_bytes(packs)} of packed frames on every node{free}"
    ended = sum(one.best for one in prints)
    going_on = sum(sorted((one.going_on for one in prints), reverse=True)[: outlook.at_once])
    first = prints[0]
    each = f"{_bytes(first.best)} a trial, {_bytes(first.going_on)} more until it has ended"
    total = "" if outlook.work.endless else f": at most {_bytes(ended + going_on)} in all"
    return f"{_bytes(packs)} of packed frames on every node{free}; in storage {each}{total}"


def _sizes(outlook: Outlook) -> list[tuple[int, int]]:
    return sorted({run.image_size for run in outlook.work.runs})


def _pack_bytes(outlook: Outlook, image_size: tuple[int, int]) -> int:
    return pack_bytes(outlook.survey.facts, image_size=image_size, frame_size=outlook.survey.source.frame_size)


def _different(outlook: Outlook) -> list[Run]:
    """A run of each memory's own kind."""
    return list({footprint.kind_of(run): run for run in outlook.work.runs}.values())


def _footprint(outlook: Outlook, run: Run) -> footprint.Footprint:
    return footprint.of(run, precision=outlook.survey.choices.precision)


# --- words ----------------------------------------------------------------------------------------------------------


def _span(seconds: float) -> str:
    """No finer than an estimate is."""
    return format_duration(round(seconds, -1) if seconds >= 100 else seconds)


def _bytes(number: float) -> str:
    for unit, size in (("TB", 1e12), ("GB", 1e9), ("MB", 1e6)):
        if number >= size:
            return f"{number / size:.3g} {unit}"
    return f"{number / 1e3:.3g} kB"
