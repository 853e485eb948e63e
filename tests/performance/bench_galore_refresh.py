"""Time and captured energy of one basis refresh: this package's randomised range finder beside galore_torch's SVD.

    python tests/performance/bench_galore_refresh.py --rows 2048 --columns 16384 --ranks 64 128 --json result.json

Gradients are synthetic (singular values falling like k ** -power, drifting a little between refreshes) unless
`--gradients FILE` names a file saved by `torch.save({name: matrix})` from a real backward pass, or a list of two such
dictionaries, an earlier and a later one. galore_torch takes minutes at the largest shapes; `--skip-reference` leaves
it out, and with it the share of the optimal energy.
"""

import argparse
import json
import platform
import time
from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor


def synthetic(rows: int, columns: int, power: float, seed: int) -> Tensor:
    """Returns a (rows, columns) matrix with a power-law spectrum and no structure the range finder could exploit."""
    generator = torch.Generator().manual_seed(seed)
    short = min(rows, columns)
    left = torch.linalg.qr(torch.randn(rows, short, generator=generator)).Q
    # A Gaussian matrix stands in for the right factor: its rows are nearly orthogonal, and a QR would cost as much.
    right = torch.randn(short, columns, generator=generator) / columns**0.5
    return (left * torch.arange(1, short + 1).float() ** -power) @ right


def seconds(work: Callable[[], Any], repeats: int, device: torch.device) -> tuple[float, Any]:
    """Returns the fastest of `repeats` runs, in seconds, and the last result."""
    best, result = float("inf"), None
    for _ in range(repeats):
        synchronize(device)
        started = time.perf_counter()
        result = work()
        synchronize(device)
        best = min(best, time.perf_counter() - started)
    return best, result


def synchronize(device: torch.device) -> None:
    if device.type == "cuda":
        torch.cuda.synchronize(device)


def share(matrix: Tensor, basis: Any) -> float:
    """Returns the share of the energy of `matrix` that its projection keeps."""
    from finetune.optim.galore_basis import project

    return (project(matrix, basis).square().sum() / matrix.square().sum()).item()


def compare(first: Tensor, later: Tensor, rank: int, repeats: int, with_reference: bool) -> dict[str, Any]:
    """Returns times and energies for one shape and rank."""
    from finetune.optim.galore_basis import randomized_basis, side_of

    device, side = first.device, side_of(first.shape, "std")

    def randomized(matrix: Tensor, previous: Any) -> Any:
        generator = torch.Generator(device=device).manual_seed(0)
        return randomized_basis(matrix, rank, side, previous=previous, generator=generator)[0]

    cold_seconds, cold = seconds(lambda: randomized(first, None), repeats, device)
    warm_seconds, warm = seconds(lambda: randomized(later, cold), repeats, device)
    result: dict[str, Any] = {
        "shape": list(first.shape),
        "rank": rank,
        "cold_seconds": cold_seconds,
        "warm_seconds": warm_seconds,
        "cold_energy": share(first, cold),
        "warm_energy": share(later, warm),
        "stale_energy": share(later, cold),
    }
    if with_reference:
        result.update(reference(first, later, rank, side, result))
    return result


def reference(first: Tensor, later: Tensor, rank: int, side: str, ours: dict[str, Any]) -> dict[str, Any]:
    """Returns galore_torch's time for one refresh, and our results relative to it and to the optimum."""
    from galore_torch.galore_projector import GaLoreProjector

    projector = GaLoreProjector(rank)
    taken, _ = seconds(lambda: projector.get_orthogonal_matrix(later, rank, type=side), 1, later.device)
    optimum = []
    for matrix in (first, later):
        short = matrix if matrix.shape[0] <= matrix.shape[1] else matrix.t()
        energies = torch.linalg.eigvalsh(short.double() @ short.double().t()).flip(0)
        optimum.append((energies[:rank].sum() / energies.sum()).item())
    return {
        "galore_torch_seconds": taken,
        "cold_speedup": taken / ours["cold_seconds"],
        "warm_speedup": taken / ours["warm_seconds"],
        "cold_of_optimum": ours["cold_energy"] / optimum[0],
        "warm_of_optimum": ours["warm_energy"] / optimum[1],
        "stale_of_optimum": ours["stale_energy"] / optimum[1],
    }


def cases(options: argparse.Namespace) -> list[tuple[str, Tensor, Tensor]]:
    """Returns (name, gradient, later gradient) of every case."""
    if options.gradients is None:
        first, fresh = (synthetic(options.rows, options.columns, options.power, seed) for seed in (0, 1))
        return [(f"power {options.power}", first, 0.8 * first + 0.2 * fresh)]
    loaded = torch.load(options.gradients, weights_only=True)
    early, later = loaded if isinstance(loaded, list) else (loaded, loaded)
    return [(name, early[name].float(), later[name].float()) for name in early]


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--rows", type=int, default=512)
    parser.add_argument("--columns", type=int, default=4096)
    parser.add_argument("--ranks", type=int, nargs="+", default=[64, 128])
    parser.add_argument("--power", type=float, default=0.75)
    parser.add_argument("--gradients")
    parser.add_argument("--device", default="cpu")
    parser.add_argument("--repeats", type=int, default=3)
    parser.add_argument("--skip-reference", action="store_true")
    parser.add_argument("--json")
    parser.add_argument("--fast", action="store_true", help="one rank only: the reference takes a minute")
    parser.add_argument("--out", help="where the result goes in the form that plots and README read")
    options = parser.parse_args()
    if options.out:
        options.rows, options.columns, options.ranks = 2048, 16384, [128] if options.fast else [64, 128]
    results = []
    for name, first, later in cases(options):
        for rank in options.ranks:
            pair = (first.to(options.device), later.to(options.device))
            result = {"case": name, **compare(*pair, rank, options.repeats, not options.skip_reference)}
            results.append(result)
            print(json.dumps({k: round(v, 5) if isinstance(v, float) else v for k, v in result.items()}), flush=True)
    if options.out:
        write(options.out, results, options.fast)
    if options.json:
        environment = {
            "torch": torch.__version__,
            "python": platform.python_version(),
            "threads": torch.get_num_threads(),
            "device": torch.cuda.get_device_name() if options.device.startswith("cuda") else platform.processor(),
        }
        with open(options.json, "w") as file:
            json.dump({"environment": environment, "results": results}, file, indent=1)


def write(path: str, results: list[dict[str, Any]], fast: bool) -> None:
    """Writes the result as the other benchmarks do: one round, because one decomposition takes up to minutes."""
    from harness import Case, environment, rounded

    cases: list[dict[str, Any]] = []
    for each in results:
        rows, columns = each["shape"]
        sides = {
            "galore-torch": {"seconds": each["galore_torch_seconds"]},
            "finetune": {"seconds": each["warm_seconds"]},
            "finetune, first basis": {"seconds": each["cold_seconds"]},
        }
        case = Case(f"{rows} x {columns}, rank {each['rank']}", {"energy": each}, [sides])
        case.ratio("seconds", "galore-torch", "finetune, first basis")
        name = f"GaLore basis refresh, {rows} x {columns}, rank {each['rank']}"
        case.bar(name, case.ratio("seconds", "galore-torch"), at_least=50.0)
        kept = "share of the optimal energy kept"
        case.result["checks"][kept] = {"value": each["warm_of_optimum"], "agree": each["warm_of_optimum"] > 0.98}
        cases.append(case.result)
    result = {
        "benchmark": "galore_refresh",
        "title": "GaLore basis refresh against galore-torch",
        "fast": fast,
        "environment": environment(),
        "cases": cases,
    }
    with open(path, "w") as file:
        file.write(json.dumps(rounded(result), indent=1) + "\n")


if __name__ == "__main__":
    main()
