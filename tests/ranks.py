"""Real processes for the tests: one start of them for a whole list of checks."""

import datetime
import json
import os
import traceback
from pathlib import Path

import torch
import torch.distributed as dist

PATIENCE = datetime.timedelta(seconds=60)


def _run_rank(rank: int, world: int, folder: str, checks: list) -> None:
    torch.set_num_threads(1)
    os.environ.setdefault("GLOO_SOCKET_IFNAME", "lo")
    rendezvous = f"file://{folder}/rendezvous"
    dist.init_process_group("gloo", rendezvous, PATIENCE, world, rank)
    outcome = {}
    try:
        for check in checks:
            torch.manual_seed(1234)
            outcome[check.__name__] = "not finished"
            check()
            outcome[check.__name__] = ""
    except BaseException:
        outcome[check.__name__] = f"rank {rank}: {traceback.format_exc()}"
        raise
    finally:
        Path(folder, f"{rank}.json").write_text(json.dumps(outcome))
    dist.destroy_process_group()


def outcomes(folder: Path, world: int, checks: list) -> dict[str, str]:
    """What became of each check: empty, or why not. A rank that fails ends all of them."""
    try:
        torch.multiprocessing.spawn(_run_rank, (world, str(folder), checks), nprocs=world)
    except Exception as error:
        ended = str(error)
    else:
        ended = "not run"
    found = {check.__name__: "" for check in checks}
    for name in found:
        for rank in range(world):
            path = folder / f"{rank}.json"
            told = json.loads(path.read_text()) if path.exists() else {}
            found[name] += told.get(name, ended)
    return found
