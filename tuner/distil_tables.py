"""What `python -m tuner distil` prints: the cover, and what of each variant's space it leaves out."""

from __future__ import annotations

import json
from collections import Counter
from collections.abc import Mapping, Sequence

from rich.console import Console

from kernels.variants import VARIANTS, space
from tuner.display import count, message, table
from tuner.distil import Case, Chosen
from tuning_db.model import Config


def print_cover(console: Console, near: Mapping[Case, set[Config]], chosen: Sequence[Chosen], slack: float) -> None:
    covered = ("newly", "covers")
    made = table("Configs, most useful first: problems that they cover newly, and in all", "config", *covered, right=covered)
    for one in chosen:
        made.add_row(str(one.config), str(one.newly), str(one.covers))
    console.print(made)
    numbers = ("space", "needed", "never near")
    made = table("Configs of each variant's space", "variant", *numbers, right=numbers)
    needed = Counter(one.config.variant for one in chosen)
    near_once = {config for configs in near.values() for config in configs}
    for name in VARIANTS:
        made.add_row(name, str(len(space(name))), str(needed[name]), str(len(space(name) - near_once)))
    total = sum(len(space(name)) for name in VARIANTS)
    never = total - len(near_once & {config for name in VARIANTS for config in space(name)})
    made.add_section()
    made.add_row("all", str(total), str(len(chosen)), str(never))
    console.print(made)
    problems = count(len(near), "measured problem")
    message(console, f"{count(len(chosen), 'config')} of {total} keep {problems} within {100 * slack:g} % of the fastest;")
    message(console, f"{never} were never that near, on these devices and problems.")


def cover_json(near: Mapping[Case, set[Config]], chosen: Sequence[Chosen], slack: float) -> str:
    """One object: the slack, how many problems there are, and the cover."""
    configs = [{"variant": c.config.variant, "params": c.config.params, "newly": c.newly, "covers": c.covers} for c in chosen]
    return json.dumps({"slack": slack, "problems": len(near), "configs": configs}, indent=2)
