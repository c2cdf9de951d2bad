"""Flags that contradict each other, or mean nothing for what is asked: a sentence each, saying what to do."""

from tune_bisenet import spaces
from tune_bisenet.arguments import Arguments, Choices
from tune_bisenet.study import sampling


def plan_problems(given: Arguments) -> list[str]:
    """Flags that mean nothing for this search, or this plan."""
    problems = []
    if given.gpus is not None and not given.plan:
        problems.append("--gpus is for --plan: a search takes the GPUs that are there. --max-concurrent bounds them.")
    if given.gpus is not None and given.address is not None:
        problems.append("--gpus and --address: plan for a cluster that is there, or for one that is not, not both.")
    if given.gpus is not None and given.gpus_per_trial == 0:
        problems.append("--gpus-per-trial 0 uses none of the --gpus that are planned for. Leave one out.")
    return problems


def kind_problems(given: Arguments, choices: Choices, space: spaces.Space) -> list[str]:
    """Flags that mean nothing, or something else, for this kind of space."""
    if isinstance(space, spaces.Sampled):
        return _sampled_problems(given, choices)
    flags = ("trials", "sampler", "objectives", "warm_start", "study", "confirm")
    asked = [f"--{flag.replace('_', '-')}" for flag in flags if getattr(given, flag) is not None]
    return (
        [f"{', '.join(asked)}: {choices.space} is a grid of declared rows, not a space to sample from."]
        if asked
        else []
    )


def _sampled_problems(given: Arguments, choices: Choices) -> list[str]:
    problems = sampling.sampler_problems(choices.sampler, choices.objectives)
    if len(choices.parts[0].seeds) > 1:
        problems.append("--seeds: a sampled search has one seed. --confirm K trains its best with K fresh ones.")
    if given.add:
        problems.append("--add is for a grid. Give a sampled search more trials by --resume --trials N.")
    if given.rerun is not None:
        problems.append("--rerun is for a grid. A sampled search tries again what failed when it is resumed.")
    if len(choices.objectives) > 1 and choices.scheduler != "fifo":
        problems.append(
            f"--scheduler {choices.scheduler} stops by mIoU alone, and would stop the fast before they are seen: "
            f"with --objectives {','.join(choices.objectives)} use fifo."
        )
    return problems
