"""How fast a phase ran."""

import time


def speed_metrics(
    split: str,
    start_time: float,
    num_samples: float | None = None,
    num_steps: float | None = None,
    num_tokens: float | None = None,
) -> dict[str, float]:
    """Returns `{split}_runtime` in seconds and the rates per second of what was counted.

    Names and rounding are those of `transformers.trainer_utils.speed_metrics`. `start_time` is from `time.time()`.
    10 samples in 2 s give `{"eval_runtime": 2.0, "eval_samples_per_second": 5.0}`.
    """
    runtime = time.time() - start_time
    metrics = {f"{split}_runtime": round(runtime, 4)}
    # A clock too coarse to see the phase says nothing about its rate.
    if runtime > 0:
        for unit, count in (("samples", num_samples), ("steps", num_steps), ("tokens", num_tokens)):
            if count is not None:
                metrics[f"{split}_{unit}_per_second"] = round(count / runtime, 3)
    return metrics
