"""Liger kernels, only the chosen ones (needs a GPU and `pip install liger-kernel`; says so without).

The fused loss of this package stays on where Liger does not replace it.
"""

from common import read_options, show

from finetune import SFTConfig, SFTTrainer, run_program


def main(argv: object = None) -> None:
    """Trains."""
    options = read_options(__doc__, "runs/liger")
    kernels = {"rope": True, "rms_norm": True, "swiglu": True, "cross_entropy": False}
    args = SFTConfig(**options.settings(use_liger_kernel=True, liger_kernel_config=kernels))
    trainer = SFTTrainer(model=options.model, args=args, train_dataset=options.rows())
    trainer.train()
    show(trainer)


if __name__ == "__main__":
    raise SystemExit(run_program(main))
