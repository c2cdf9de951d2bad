"""`--plan`: what a search would take, said without starting anything.

A few frames are read and some iterations timed, in processes of their own; nothing is packed, fetched or written.
"""

import math
import os
from dataclasses import replace
from typing import Final

import torch
from rich.console import Console

from tune_bisenet import briefing, forecast, ledger, ray_session, rehearsal, timing
from tune_bisenet.arguments import Arguments
from tune_bisenet.data.source import DataError
from tune_bisenet.flight import Survey
from tune_bisenet.forecast import Speed, Work
from tune_bisenet.launch import UNBOUNDED_TRIALS, check_limits
from tune_bisenet.outlook import Outlook
from tune_bisenet.ray_session import Cluster, Node
from tune_bisenet.results import Standing
from tune_bisenet.spaces import Sampled
from tune_bisenet.timing import ProbeError

CANNOT_PLAN: Final = (ray_session.ClusterError, DataError)

CORES_PER_GPU: Final = 4
"""Of a cluster that is not there yet: what the smallest cloud machines have beside a GPU."""


def print_page(console: Console, survey: Survey) -> None:
    """Say it. ClusterError if no such cluster can hold a trial, DataError if a frame is damaged."""
    sampled = isinstance(survey.space, Sampled)
    num_trials = (survey.limits.trials or UNBOUNDED_TRIALS) if sampled else len(survey.runs)
    resources = ray_session.allot(_cluster(survey.arguments), survey.arguments, num_trials=num_trials)
    check_limits(survey.limits, resources)
    standings = ledger.read_trials(survey.folder).standings if survey.arguments.continues else ()
    only = survey.arguments.rerun
    work = _sampled_work(survey, standings) if sampled else forecast.grid_work(survey.runs, standings, only=only)
    outlook = Outlook(
        work=work,
        arguments=survey.arguments,
        choices=survey.choices,
        limits=survey.limits,
        space=survey.space,
        facts=survey.facts,
        frame_size=survey.source.frame_size,
        cache_dir=survey.cache_dir,
        resources=resources,
        speed=_known_speed(survey, standings),
    )
    briefing.print_survey(console, survey, _timed(outlook, survey))


def _cluster(arguments: Arguments) -> Cluster:
    """What Ray would find, or finds at an address; or what is planned for."""
    if arguments.gpus is not None:
        cores = math.ceil((arguments.cpus_per_trial or 0) / (arguments.gpus_per_trial or 1.0))
        return _one_node(cpus=arguments.gpus * max(CORES_PER_GPU, cores), gpus=arguments.gpus)
    if arguments.address is not None:
        with ray_session.ray_session(arguments.address) as cluster:
            return cluster()
    return _one_node(cpus=os.cpu_count() or 1, gpus=torch.cuda.device_count())


def _one_node(*, cpus: int, gpus: int) -> Cluster:
    return Cluster((Node(id="planned", cpus=cpus, gpus=gpus),))


def _sampled_work(survey: Survey, standings: tuple[Standing, ...]) -> Work:
    begun = []
    if survey.arguments.continues:
        suggested = rehearsal.read_suggested(survey.folder).values()
        begun = [one.run for one in suggested if one.origin != "confirm"]
    names = {run.name for run in begun}
    return forecast.sampled_work(
        begun,
        [run for run in survey.runs if run.name not in names],
        survey.drawn,
        standings,
        limit=survey.limits.trials,
        fresh=briefing.CONFIRMED_RUNS * (survey.limits.confirm or 0),
    )


def _known_speed(survey: Survey, standings: tuple[Standing, ...]) -> Speed | None:
    if survey.arguments.images_per_second is not None:
        return forecast.given_speed(survey.arguments.images_per_second, survey.example)
    return forecast.measured_speed(standings)


def _timed(outlook: Outlook, survey: Survey) -> Outlook:
    """With the speed timed here, where it is not known and can be."""
    if outlook.speed is not None or not outlook.work.left:
        return outlook
    if outlook.has_gpus and not torch.cuda.is_available():
        return replace(outlook, speed_problem="no GPU here to time it on; --images-per-second X states it")
    runs = [run for run, _done in outlook.work.left]
    try:
        timings = timing.time_trials(survey.source, runs, outlook.resources, survey.choices.precision)
    except ProbeError as error:
        return replace(outlook, speed_problem=f"a trial could not be timed here: {error}")
    return replace(outlook, speed=timings.speed, timings=timings)
