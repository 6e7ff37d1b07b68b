"""Everything heavy that a run imports, imported once, for a parent that forks runs."""


def import_all() -> None:
    """Import torch, DeepSpeed, Megatron and our training code. Starts no thread and no process group."""
    from ..compat.cuda_standin import install

    install()
    import tensorboard.summary.writer.event_file_writer
    from megatron.core.datasets import gpt_dataset

    from . import attempt

    _ = attempt, gpt_dataset, tensorboard
