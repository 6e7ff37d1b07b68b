"""Everything heavy that a run imports, imported once, for a parent that forks runs."""

import os


def import_all() -> None:
    """Import torch, DeepSpeed, Megatron and our training code. Starts no thread, no process group and not CUDA."""
    # A process that has asked CUDA for devices cannot fork others that use them; this makes torch ask the driver.
    os.environ["PYTORCH_NVML_BASED_CUDA_CHECK"] = "1"
    from ..compat.cuda_standin import install

    install()
    import tensorboard.summary.writer.event_file_writer
    from megatron.core.datasets import gpt_dataset

    from ..scaling import condensed
    from . import attempt

    _ = attempt, condensed, gpt_dataset, tensorboard
