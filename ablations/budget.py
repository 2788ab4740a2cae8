"""Which runs of a sweep to do with a budget of GPU-hours: those that fill the most cells of its artifacts."""

from __future__ import annotations

from collections import Counter
from collections.abc import Container, Mapping
from dataclasses import replace
from math import fsum

from ablations.planner import Sweep
from sdae.errors import UserError

SECONDS = 5.0  # for each of the three goals; then the best answer found so far is taken
UNITS = 1000.0  # the budget in the solver's units: its tolerance of 1e-6 becomes a billionth of the budget
SLACKS = (0.0, 1e-9, 1e-7, 1e-5)  # shares of the budget held back, each where the one before let it be passed

Bills = dict[tuple[str, int], frozenset[str]]  # what is to be run to fill (cell, seed)


def within(sweep: Sweep, hours: float, done: Container[str], cost: Mapping[str, float]) -> Sweep:
    """The part of a sweep that fills the most cells for at most `hours` GPU-hours, and its runs that are done.

    done: ids of the runs that are, also of those that the sweep needs and does not hold. cost: GPU-hours of each run
    that is not done, the high bound, so that the budget is kept. A (cell, seed) is filled once its runs, and what
    they need, are done or chosen; a cell once one of its seeds is. Of the parts with the most cells it is one with the
    most (cell, seed), and of those one with the fewest hours. Raises `UserError` for a budget that is none.
    """
    if not hours >= 0:
        raise UserError(f"--max-gpu-hours {hours:g}: at least 0")
    bills = {at: bill for at, bill in _bills(sweep, done).items() if fsum(cost[i] for i in bill) <= hours}
    chosen = frozenset[str]().union(*bills.values())
    if fsum(cost[i] for i in chosen) > hours:
        chosen = _fullest(bills, cost, hours)
    runs = {i: run for i, run in sweep.runs.items() if i in chosen or i in done}
    return replace(sweep, runs=runs, requested=len(runs))


def _bills(sweep: Sweep, done: Container[str]) -> Bills:
    """By (cell, seed): the runs to do for it, needs included; without those that wait for what nothing here does."""
    takes: dict[str, frozenset[str]] = {}
    for run in sweep.runs.values():  # topological: needs first
        if run.id in done:
            takes[run.id] = frozenset()
        elif all(need in takes or need in done for need in run.needs):
            takes[run.id] = frozenset([run.id]).union(*(takes.get(need, ()) for need in run.needs))
    runs: dict[tuple[str, int], list[str]] = {}
    for cell, entries in sweep.cells.items():
        for seed, identity in entries:
            runs.setdefault((cell, seed), []).append(identity)
    return {
        at: frozenset[str]().union(*(takes.get(i, ()) for i in ids))
        for at, ids in runs.items()
        if all(i in takes or i in done for i in ids)
    }


def _fullest(bills: Bills, cost: Mapping[str, float], hours: float) -> frozenset[str]:
    """The runs to do, by integer programs: most cells, then most (cell, seed), then fewest hours.

    One program per goal, the goals before it as constraints: weights that put the three into one bring the last goal
    near the solver's tolerances, and at 1,000 runs took it ten times as long. Variables are the
    runs, the (cell, seed) and the cells, each 0 or 1. An answer counts for what it fills, worked out here, and only
    where it keeps the budget to the last bit; where it passes it by less than the tolerance, parts that come as close
    to the budget are left out. Proven best in well under a second at 1,000 runs; out of time, the best that was found.
    """
    import numpy as np
    from scipy.optimize import Bounds, LinearConstraint, milp
    from scipy.sparse import csr_array

    every = bills
    bills, weight = _merged(every)
    runs = {identity: column for column, identity in enumerate(sorted(frozenset[str]().union(*bills.values())))}
    cells = {cell: row for row, cell in enumerate(dict.fromkeys(cell for cell, _ in bills))}
    of_pairs, of_cells = len(runs), len(runs) + len(bills)  # the first column of each
    entries = [(row, of_cells + row, 1) for row in cells.values()]  # row, column, value of A, where A x <= 0
    row = len(cells)
    for column, ((cell, _), bill) in enumerate(bills.items(), of_pairs):
        entries.append((cells[cell], column, -1))  # a cell <= the sum of its seeds
        for identity in sorted(bill):  # one order: the same answer every time
            entries += [(row, column, 1), (row, runs[identity], -1)]  # a (cell, seed) <= each of its runs
            row += 1
    rows, columns, values = zip(*entries, strict=True)
    size = of_cells + len(cells)
    matrix = csr_array((values, (rows, columns)), shape=(row, size))
    is_cell, is_pair, price = np.zeros((3, size))
    is_cell[of_cells:] = [weight[cell] for cell in cells]
    is_pair[of_pairs:of_cells] = [weight[cell] for cell, _ in bills]
    price[:of_pairs] = [cost[identity] / hours * UNITS for identity in runs]

    def rank(chosen: frozenset[str]) -> tuple[float, float, float]:
        """The smaller the better, one number per goal."""
        filled = [cell for (cell, _), bill in every.items() if bill <= chosen]
        return -len(set(filled)), -len(filled), fsum(cost[i] for i in chosen)

    best = _cheapest_first(every, cost, hours)
    constraints = [LinearConstraint(matrix, ub=0)]
    for number, goal in enumerate((-is_cell, -is_pair, price)):
        for slack in SLACKS:
            answer = milp(
                goal, integrality=np.ones(size), bounds=Bounds(0, 1),
                constraints=[*constraints, LinearConstraint(price, ub=UNITS * (1 - slack))],
                options={"time_limit": SECONDS, "mip_rel_gap": 0},
            )  # fmt: skip
            if answer.x is None:  # nothing found in time, or nothing better
                break
            picked = {i for i, x in zip(runs, answer.x[:of_pairs], strict=True) if x > 0.5}
            chosen = frozenset[str]().union(*(bill for bill in bills.values() if bill <= picked))
            if fsum(cost[i] for i in chosen) <= hours:
                best = min(best, chosen, key=rank)
                break
        constraints.append(LinearConstraint(goal, ub=rank(best)[number]))
    return best


def _merged(bills: Bills) -> tuple[Bills, Counter[str]]:
    """Of cells that the same runs fill seed by seed (the columns of a table) one, and how many it stands for."""
    seeds: dict[str, dict[int, frozenset[str]]] = {}
    for (cell, seed), bill in bills.items():
        seeds.setdefault(cell, {})[seed] = bill
    first: dict[frozenset[tuple[int, frozenset[str]]], str] = {}
    weight = Counter(first.setdefault(frozenset(own.items()), cell) for cell, own in seeds.items())
    return {(cell, seed): bill for (cell, seed), bill in bills.items() if cell in weight}, weight


def _cheapest_first(bills: Bills, cost: Mapping[str, float], hours: float) -> frozenset[str]:
    """What to have where a program ends with nothing: one seed of each cell, then the others, while they fit.

    In the order of their hours, where all (cell, seed) of a run pay an equal share of it.
    """
    payers = Counter(identity for bill in bills.values() for identity in bill)
    order = sorted(bills, key=lambda at: fsum(cost[i] / payers[i] for i in bills[at]))
    chosen: set[str] = set()
    cells: set[str] = set()
    room = hours * (1 - 1e-9)  # for the rounding of what is subtracted
    for more_seeds in (False, True):
        for at in order:
            price = fsum(cost[i] for i in bills[at] - chosen)
            if (more_seeds or at[0] not in cells) and price <= room:
                room -= price
                chosen |= bills[at]
                cells.add(at[0])
    return frozenset(chosen)
