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
    for check in checks:
        torch.manual_seed(1234)
        try:
            check()
            outcome[check.__name__] = ""
        except BaseException:
            outcome[check.__name__] = f"rank {rank}: {traceback.format_exc()}"
            raise
        finally:
            Path(folder, f"{rank}.json").write_text(json.dumps(outcome))
    if dist.is_initialized():
        dist.destroy_process_group()


def outcomes(folder: Path, world: int, checks: list) -> dict[str, str]:
    """What became of each check: empty, or why not. A rank that fails ends all of them."""
    ended = "not run"
    try:
        torch.multiprocessing.spawn(_run_rank, (world, str(folder), checks), nprocs=world)
    except Exception as error:  # the first of them; the files below tell more
        ended = str(error)
    told = [json.loads(p.read_text()) for p in sorted(folder.glob("*.json"))]
    return {
        name: "\n".join(t[name] for t in told if t.get(name))
        or ("" if len(told) == world and all(name in t for t in told) else ended)
        for name in (check.__name__ for check in checks)
    }
