"""`--plan`: what a search would take, said without starting anything.

A few frames are read and some iterations timed, in processes of their own; nothing is packed, fetched or written.
"""

import math
import os
from dataclasses import replace
from typing import Final

import torch
from rich.console import Console

from tune_bisenet import briefing, ledger, ray_session, rehearsal
from tune_bisenet.arguments import Arguments
from tune_bisenet.data.source import DataError
from tune_bisenet.estimate import timing
from tune_bisenet.estimate.outlook import Outlook
from tune_bisenet.estimate.timing import ProbeError
from tune_bisenet.flight import Survey
from tune_bisenet.launch import UNBOUNDED_TRIALS, check_limits
from tune_bisenet.ray_session import Cluster, Node

CANNOT_PLAN: Final = (ray_session.ClusterError, DataError)

CORES_PER_GPU: Final = 4
"""Of a cluster that is not there yet: what the smallest cloud machines have beside a GPU."""


def print_page(console: Console, survey: Survey) -> None:
    """Say it. ClusterError if no such cluster can hold a trial, DataError if a frame is damaged."""
    num_trials = survey.num_trials or UNBOUNDED_TRIALS
    resources = ray_session.allot(_cluster(survey.arguments), survey.arguments, num_trials=num_trials)
    check_limits(survey.limits, resources)
    standings = ledger.read_trials(survey.folder).standings if survey.arguments.continues else ()
    suggested = rehearsal.read_suggested(survey.folder) if survey.draft and survey.arguments.continues else {}
    outlook = briefing.outlook_of(survey, resources, standings, suggested=suggested.values())
    briefing.print_survey(console, _timed(outlook))


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


def _timed(outlook: Outlook) -> Outlook:
    """With the speed timed here, where it is not known and can be."""
    if outlook.speed is not None or not outlook.work.left:
        return outlook
    if outlook.has_gpus and not torch.cuda.is_available():
        return replace(outlook, speed_problem="no GPU here to time it on; --images-per-second X states it")
    survey, runs = outlook.survey, [run for run, _done in outlook.work.left]
    try:
        timings = timing.time_trials(survey.source, runs, outlook.resources, survey.choices.precision)
    except ProbeError as error:
        return replace(outlook, speed_problem=f"a trial could not be timed here: {error}")
    return replace(outlook, speed=timings.speed, timings=timings)
