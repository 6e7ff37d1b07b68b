import os
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest
import torch

from moescale.base.errors import UserError
from moescale.data import DataConfig, PreparedData
from moescale.data.loader import TrainStream, _epoch_seed

SEQ = 16


def alone(config: DataConfig, name: str) -> DataConfig:
    """``config`` reading one domain only."""
    return config.model_copy(update={"domains": {name: config.domains[name]}, "weights": {}})


def megatron_epoch(prepared: PreparedData, domain: str, seed: int, cache: Path):
    """A GPTDataset set up the way Megatron's own scripts do: a blend, a split, index files on disk."""
    from megatron.core.datasets.gpt_dataset import GPTDataset, GPTDatasetConfig
    from megatron.core.datasets.utils import Split

    part = prepared.part(domain, "train")
    config = GPTDatasetConfig(
        random_seed=seed,
        sequence_length=SEQ,
        blend=([part.prefix], None),
        split="1,0,0",
        path_to_cache=str(cache),
        tokenizer=prepared.tokenizer,
        reset_position_ids=False,
        reset_attention_mask=False,
        eod_mask_loss=False,
    )
    return GPTDataset(
        GPTDataset.build_low_level_dataset(part.prefix, config), part.prefix, part.order, None, Split.train, config
    )


def test_samples_are_those_of_megatrons_dataset_epoch_after_epoch(
    prepared: PreparedData, data_config: DataConfig, tmp_path: Path
) -> None:
    stream = TrainStream(prepared, alone(data_config, "rows"), SEQ, seed=7)
    at = 0
    for epoch in range(2):
        dataset = megatron_epoch(prepared, "rows", _epoch_seed(7, epoch), tmp_path)
        assert len(dataset) > 50
        tokens_BS, labels_BS, mask_BS = stream.samples(range(at, at + len(dataset)))
        for row in range(len(dataset)):
            expected = dataset[row]
            assert torch.equal(tokens_BS[row], expected["tokens"])
            assert torch.equal(labels_BS[row], expected["labels"])
            assert torch.equal(mask_BS[row], expected["loss_mask"])
        at += len(dataset)


def test_an_epoch_reads_everything_once(prepared: PreparedData, data_config: DataConfig) -> None:
    part = prepared.part("files", "train")
    per_epoch = (part.tokens - 1) // SEQ
    stream = TrainStream(prepared, alone(data_config, "files"), SEQ, seed=0)
    raw = np.fromfile(f"{part.prefix}.bin", dtype=np.uint16)
    for epoch in range(2):
        tokens_BS, _, _ = stream.samples(range(epoch * per_epoch, (epoch + 1) * per_epoch))
        counted = np.bincount(tokens_BS.flatten().numpy(), minlength=prepared.vocab_size)
        missing = np.bincount(raw, minlength=prepared.vocab_size) - counted
        assert missing.min() >= 0
        assert missing.sum() == part.tokens - per_epoch * SEQ <= SEQ
    first, second = (stream.samples(range(at, at + per_epoch))[0] for at in (0, per_epoch))
    assert (first == second).all(dim=1).float().mean() < 0.05, "the epochs have the same order"


def test_types_shapes_and_labels(prepared: PreparedData, data_config: DataConfig) -> None:
    stream = TrainStream(prepared, data_config, SEQ, seed=0)
    assert len(stream) == 2000
    tokens_BS, labels_BS, mask_BS = stream.samples([3, 1999, 3])
    assert tokens_BS.shape == labels_BS.shape == mask_BS.shape == (3, SEQ)
    assert (tokens_BS.dtype, labels_BS.dtype, mask_BS.dtype) == (torch.int64, torch.int64, torch.float32)
    assert torch.equal(tokens_BS[:, 1:], labels_BS[:, :-1])
    assert torch.equal(tokens_BS[0], tokens_BS[2])
    assert stream.samples([])[0].shape == (0, SEQ)


def test_order_depends_on_the_seed_and_not_on_how_it_is_read(prepared: PreparedData, data_config: DataConfig) -> None:
    whole = TrainStream(prepared, data_config, SEQ, seed=5).samples(range(2000))[0]
    short = data_config.model_copy(update={"samples": 700})
    assert torch.equal(TrainStream(prepared, short, SEQ, seed=5).samples(range(700))[0], whole[:700])
    stream = TrainStream(prepared, data_config, SEQ, seed=5)
    for index in (1999, 0, 1000, 999, 1500):
        assert torch.equal(stream.samples([index])[0][0], whole[index])
    other = TrainStream(prepared, data_config, SEQ, seed=6).samples(range(2000))[0]
    assert (other == whole).all(dim=1).float().mean() < 0.05


def test_domains_come_by_weight_at_every_moment(prepared: PreparedData, data_config: DataConfig) -> None:
    stream = TrainStream(prepared, data_config, SEQ, seed=0)
    share = np.cumsum(stream._domain_of == 0) / np.arange(1, 2001)
    assert abs(share[100:] - 0.75).max() < 0.01
    by_tokens = TrainStream(prepared, data_config.model_copy(update={"weights": {}}), SEQ, seed=0)
    tokens = [prepared.part(name, "train").tokens for name in ("files", "rows")]
    assert (by_tokens._domain_of == 0).mean() == pytest.approx(tokens[0] / sum(tokens), abs=0.01)
    only = data_config.model_copy(update={"weights": {"files": 0.0, "rows": 2.0}})
    rows = TrainStream(prepared, alone(data_config, "rows"), SEQ, seed=0).samples(range(20))[0]
    assert torch.equal(TrainStream(prepared, only, SEQ, seed=0).samples(range(20))[0], rows)


def test_what_cannot_be_read_is_refused(prepared: PreparedData, data_config: DataConfig) -> None:
    stream = TrainStream(prepared, data_config, SEQ, seed=0)
    for index in (2000, -1):
        with pytest.raises(
            UserError, match=rf"data\.samples \(2000\): training reads sample {index}; raise data\.samples"
        ):
            stream.samples([0, index])
    with pytest.raises(UserError, match=r"data\.domains\.files: its \d+ training tokens are fewer than training\.seq"):
        TrainStream(prepared, data_config, 1_000_000, seed=0)


RANK = """
import hashlib, sys, time
from pathlib import Path
import torch
from moescale.data import DataConfig, prepare
from moescale.data.loader import TrainStream, held_out_sequences

rank, folder = int(sys.argv[1]), Path(sys.argv[2])
config = DataConfig.model_validate_json(Path(sys.argv[3]).read_text())
torch.distributed.init_process_group("gloo", init_method=f"file://{folder}/store", rank=rank, world_size=2)
while rank == 0 and not (folder / "1").exists():  # rank 0 joins in nothing until rank 1 is done
    time.sleep(0.05)
prepared = prepare(config)
tokens = TrainStream(prepared, config, 16, 3).samples(range(300))[0]
held_out = held_out_sequences(prepared, "apart", 16, 20).tokens_NS
(folder / str(rank)).write_text(hashlib.sha256(tokens.numpy().tobytes() + held_out.numpy().tobytes()).hexdigest())
torch.distributed.barrier()
torch.distributed.destroy_process_group()
"""


@pytest.mark.distributed
def test_a_rank_prepares_and_reads_without_the_other(data_config: DataConfig, tmp_path: Path) -> None:
    config = tmp_path / "config.json"
    config.write_text(data_config.model_copy(update={"path": str(tmp_path / "prepared")}).model_dump_json())
    environment = os.environ | {"OMP_NUM_THREADS": "1"}
    ranks = [
        subprocess.Popen(
            [sys.executable, "-W", "ignore", "-c", RANK, str(rank), str(tmp_path), str(config)], env=environment
        )
        for rank in range(2)
    ]
    try:
        assert [rank.wait(timeout=120) for rank in ranks] == [0, 0]
    finally:
        for rank in ranks:
            rank.kill()
    assert (tmp_path / "0").read_text() == (tmp_path / "1").read_text()
