"""Time and captured energy of one basis refresh: this package's randomised range finder beside galore_torch's SVD.

    python tests/performance/bench_galore_refresh.py --rows 2048 --columns 16384 --ranks 64 128 --json result.json

Gradients are synthetic (singular values falling like k ** -power, drifting a little between refreshes) unless
`--gradients FILE` names a file saved by `torch.save({name: matrix})` from a real backward pass, or a list of two such
dictionaries, an earlier and a later one. galore_torch takes minutes at the largest shapes; `--skip-reference` leaves
it out, and with it the share of the optimal energy.

    python tests/performance/bench_galore_refresh.py --fast --out results/galore_refresh.json
    python tests/performance/bench_galore_refresh.py --large --out results/galore_refresh_large.json

compare in pairs, both sides alternating in one process, and write what plots and README read. One decomposition of
2048 x 16384 takes galore_torch 16 s on two cores: five pairs are a minute and a half, too long for the fast set. So
`--fast` takes 1024 x 8192 and has no goal; the goal is that of `--large`, which `run_all.py --full` runs too.
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
    parser.add_argument("--fast", action="store_true", help="with --out: 1024 x 8192, rank 128")
    parser.add_argument("--large", action="store_true", help="with --out: 2048 x 16384, rank 128; without: rank 64 too")
    parser.add_argument("--pairs", type=int, default=5, help="with --out: refreshes of each side")
    parser.add_argument("--out", help="where the result goes in the form that plots and README read")
    options = parser.parse_args()
    if options.out:
        ranks = [128] if options.fast or options.large else [64, 128]
        write(options.out, (1024, 8192) if options.fast else (2048, 16384), ranks, options.pairs, options.fast)
        return
    results = []
    for name, first, later in cases(options):
        for rank in options.ranks:
            pair = (first.to(options.device), later.to(options.device))
            result = {"case": name, **compare(*pair, rank, options.repeats, not options.skip_reference)}
            results.append(result)
            print(json.dumps({k: round(v, 5) if isinstance(v, float) else v for k, v in result.items()}), flush=True)
    if options.json:
        environment = {
            "torch": torch.__version__,
            "python": platform.python_version(),
            "threads": torch.get_num_threads(),
            "device": torch.cuda.get_device_name() if options.device.startswith("cuda") else platform.processor(),
        }
        with open(options.json, "w") as file:
            json.dump({"environment": environment, "results": results}, file, indent=1)


def paired(first: Tensor, later: Tensor, rank: int, pairs: int) -> list[dict[str, dict[str, float]]]:
    """Returns `pairs` rounds of seconds: galore_torch, ours from the last basis, ours from nothing; then backwards."""
    from galore_torch.galore_projector import GaLoreProjector

    from finetune.optim.galore_basis import randomized_basis, side_of

    device, side = first.device, side_of(first.shape, "std")
    projector = GaLoreProjector(rank)

    def randomized(matrix: Tensor, previous: Any) -> Any:
        generator = torch.Generator(device=device).manual_seed(0)
        return randomized_basis(matrix, rank, side, previous=previous, generator=generator)[0]

    cold = randomized(first, None)
    randomized(later, cold)
    actions: dict[str, Callable[[], Any]] = {
        "galore-torch": lambda: projector.get_orthogonal_matrix(later, rank, type=side),
        "finetune": lambda: randomized(later, cold),
        "finetune, first basis": lambda: randomized(first, None),
    }
    rounds: list[dict[str, dict[str, float]]] = []
    for number in range(pairs):
        order = list(actions) if number % 2 == 0 else list(actions)[::-1]
        taken = {name: {"seconds": seconds(actions[name], 1, device)[0]} for name in order}
        rounds.append({name: taken[name] for name in actions})
        print("  round", number, rounds[-1], flush=True)
    return rounds


def energy(first: Tensor, later: Tensor, rank: int) -> float:
    """Returns the share of the optimal energy that our refreshed basis keeps of `later`."""
    from finetune.optim.galore_basis import randomized_basis, side_of

    side = side_of(first.shape, "std")
    bases: list[Any] = [None]
    for matrix in (first, later):
        generator = torch.Generator(device=first.device).manual_seed(0)
        bases.append(randomized_basis(matrix, rank, side, previous=bases[-1], generator=generator)[0])
    short = later if later.shape[0] <= later.shape[1] else later.t()
    energies = torch.linalg.eigvalsh(short.double() @ short.double().t()).flip(0)
    return share(later, bases[-1]) / (energies[:rank].sum() / energies.sum()).item()


def write(path: str, shape: tuple[int, int], ranks: list[int], pairs: int, fast: bool) -> None:
    """Measures pairs and writes the result as the other benchmarks do."""
    from harness import Case, rounded
    from machine import Others, environment, load, peaks

    around, others, measured = environment(), Others(), peaks()
    (rows, columns), cases = shape, []
    first, fresh = (synthetic(rows, columns, 0.75, seed) for seed in (0, 1))
    later = 0.8 * first + 0.2 * fresh
    for rank in ranks:
        case = Case(f"{rows} x {columns}, rank {rank}", {"power": 0.75}, paired(first, later, rank, pairs))
        case.ratio("seconds", "galore-torch", "finetune, first basis")
        # One look at the gradient each way: the product that spans the basis and the one that projects on it.
        operations = 2 * 2 * rows * columns * rank
        floor, theirs = operations / (measured["float32_gflops"] * 1e9), case.values("galore-torch", "seconds")
        case.bar(
            f"GaLore basis refresh, {rows} x {columns}, rank {rank}",
            case.ratios("seconds", "galore-torch"),
            at_least=None if fast else 50.0,
            floor={
                "operations": operations,
                "seconds": floor,
                "best_possible": sorted(theirs)[len(theirs) // 2] / floor,
                "says": f"two products of the gradient with {rank} columns, {operations / 1e9:.3g} GFLOP, take "
                f"{floor:.2g} s at the measured {measured['float32_gflops']:.0f} GFLOP/s",
            },
        )
        kept = energy(first, later, rank)
        case.result["checks"]["share of the optimal energy kept"] = {"value": kept, "agree": kept > 0.98}
        cases.append(case.result)
    result = {
        "benchmark": "galore_refresh" if fast else "galore_refresh_large",
        "title": "GaLore basis refresh against galore-torch",
        "fast": fast,
        "environment": {**around, "load_at_end": load(), "cores_busy_with_others": others.busy_cores()},
        "cases": cases,
    }
    with open(path, "w") as file:
        file.write(json.dumps(rounded(result), indent=1) + "\n")


if __name__ == "__main__":
    main()
