"""The command grid.

Its options are the parameters of a function, which imports heavy modules inside.
"""

import tyro

from bitbyte.cli.options import Json, argument, pairs


def grid(
    file: argument(str, "GRID"),
    /,
    on: str = "local",
    out: str | None = None,
    queue: tyro.conf.UseAppendAction[tuple[str, ...]] = (),
    wait: bool = True,
    status: bool = False,
    json: Json = False,
) -> dict:
    """Train, or run a notebook, for many combinations of options.

    For example: bitbyte grid grid.yaml --on local:4

    The file names what is fixed and what varies (docs/scale.md).  Every combination is a cell in
    one folder, that any number of machines, queues and shells may share.  Cells that are done are
    not done again; those that were stopped continue; those that failed are tried again.

    Args:
        file: grid file (YAML or JSON), or the folder of a grid to go on with.
        on: local, local:4 (four processes), slurm, slurm:16 (at most so many jobs), ray, ray:8.
        out: folder of the grid; default: artifacts/grids/NAME.
        queue: NAME=VALUE for the engine, repeatable: what submitit takes (slurm_partition=main,
            timeout_min=60, cpus_per_task=4), or the options of a task of Ray (num_cpus=2).
        wait: watch until all is done; --no_wait (slurm) only submits the jobs.
        status: only show how far the grid is.
    """
    from bitbyte.workbench import engines
    from bitbyte.workbench.grid import read_grid

    options = pairs("--queue", queue)
    found = read_grid(file, out)
    if status:
        states = engines.states_of(found)
    else:
        states = engines.run_grid(found, on, options, wait=wait, show=engines.Screen(found))
    if not json:
        print(engines.table(found, states))
        print(f"\n{engines.summary(found, states)}\n{found.folder}")
    if not status:
        engines.raise_failures(states)
    return engines.as_document(found, states)
